"""Named places where a test makes a rank die, raise or hang.

`MPIFED_FAILPOINT="name:round:rank[:action]"` with action `kill` (SIGKILL, the default), `raise`, `hang` or `exit`
(`os._exit(3)`); several are separated by commas. Without the variable, `reach` costs one dictionary look-up.
"""

from __future__ import annotations

import os
import signal
import time

NAMES = (
    "round.start",
    "round.after_download",
    "client.before",
    "client.after",
    "round.before_upload",
    "round.after_upload",
    "server.before",
    "server.after",
    "round.end",
    "checkpoint.before",
    "checkpoint.file_open",
    "checkpoint.file_written",
    "checkpoint.agreed",
    "checkpoint.manifest_written",
    "checkpoint.renamed",
    "checkpoint.pruned",
    "resume.found",
    "resume.loaded",
)


def _parse(text: str) -> dict[tuple[str, int, int], str]:
    points: dict[tuple[str, int, int], str] = {}
    for item in filter(None, text.split(",")):
        name, round_, rank, *action = item.split(":")
        if name not in NAMES:
            raise ValueError(f"MPIFED_FAILPOINT: no fail-point is called '{name}'; known: {', '.join(NAMES)}")
        points[(name, int(round_), int(rank))] = action[0] if action else "kill"
    return points


_ARMED = _parse(os.environ.get("MPIFED_FAILPOINT", ""))


def reach(name: str, round_: int, rank: int) -> None:
    """Do here what `MPIFED_FAILPOINT` asks for, if it does."""
    action = _ARMED.get((name, round_, rank))
    if action is None:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "exit":
        os._exit(3)
    if action == "hang":
        time.sleep(10**6)
    raise RuntimeError(f"fail-point {name} in round {round_} on rank {rank}")
