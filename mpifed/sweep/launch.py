"""Running members of a sweep: each by a launcher of its own, some at a time, until all have ended or a signal comes.

What a member's launcher returns is not trusted: a member is complete when its summary says so.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from mpifed.errors import REQUEUE, BadInput
from mpifed.progress import duration, percent
from mpifed.storage.summary import number
from mpifed.sweep.plan import Member, Sweep
from mpifed.sweep.state import State

POLL_SECONDS = 0.05
ESCALATION = (signal.SIGUSR1, signal.SIGINT, signal.SIGKILL)
"""What a launcher is sent at the first, second and third signal: checkpoint; end; die. USR1 and not TERM, because every
launcher passes it on to the ranks and does nothing else. A launcher's ranks end with it."""
UNBOUND = {"PRTE_MCA_hwloc_default_binding_policy": "none", "OMPI_MCA_hwloc_base_binding_policy": "none"}
"""Open MPI 5 and 4 bind ranks to cores, and two launches at once to the same ones."""


@dataclass(frozen=True)
class Outcome:
    """How a member's launch ended: its launcher's exit code, the last words in its log where it failed."""

    member: Member
    kind: Literal["complete", "stopped", "failed", "not started"]
    code: int = 0
    reason: str = ""
    log: Path | None = None


@dataclass
class _Launch:
    member: Member
    process: subprocess.Popen[bytes]
    log: Path
    offset: int
    began: float
    signals: int = 0


class Signals:
    """Counts the signals that ask for an end; `caught` installs the handlers and puts the old ones back."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        old = {number: signal.signal(number, self._count) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _count(self, number: int, frame: object) -> None:
        self.count += 1


def launcher_command(text: str) -> list[str]:
    """The words of a launcher such as `mpirun` or `srun --exact`, found beside this Python or on `PATH`.

    Raises `BadInput` where there is none.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BadInput(f"--launcher: '{text}' cannot be split into words: {error}") from None
    found = shutil.which(words[0], path=_search_path()) if words else None
    if found is None:
        raise BadInput(f"--launcher: there is no '{words[0] if words else ''}' beside {sys.executable} or on PATH")
    return [found, *words[1:]]


def _search_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def run_members(
    sweep: Sweep,
    members: Sequence[tuple[Member, State]],
    launcher: Sequence[str],
    parallel: int,
    ranks: int | None,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Run members that are new and go on with those that are unfinished, `parallel` at a time; one outcome each.

    A member that fails does not stop the others. SIGINT, SIGTERM, SIGUSR1 and SIGHUP are passed on to the running
    members, which checkpoint and leave; no other is started.
    """
    waiting, running = list(members), list[_Launch]()
    outcomes: list[Outcome] = []
    environment = os.environ | {"PATH": _search_path()}
    if parallel > 1:
        environment = UNBOUND | environment
    with Signals().caught() as signals:
        while running or (waiting and not signals.count):
            while waiting and len(running) < parallel and not signals.count:
                member, state = waiting.pop(0)
                command = [*launcher, "-n", str(ranks or member.ranks), sys.executable, "-m", "mpifed.run"]
                launch = _start(sweep, member, [*command, *_arguments(sweep, member, state)], environment)
                running.append(launch)
                how = "go on" if state.kind == "unfinished" else "start"
                say(f"{how:8}  {member.name}  ({len(members) - len(waiting)} of {len(members)})")
            _pass_on(running, signals.count, say)
            ended = [launch for launch in running if launch.process.poll() is not None]
            for launch in ended:
                running.remove(launch)
                outcome = _outcome(launch, bool(signals.count))
                outcomes.append(outcome)
                say(_line(outcome, time.monotonic() - launch.began))
            if not ended:
                time.sleep(POLL_SECONDS)
    return outcomes + [Outcome(member, "not started") for member, _ in waiting]


def job_file(sweep: Sweep, member: Member) -> Path:
    """Where a member's validated job stands before its run folder is made."""
    return sweep.folder / "jobs" / f"{member.name}.toml"


def _arguments(sweep: Sweep, member: Member, state: State) -> list[str]:
    if state.kind == "unfinished":
        return ["--resume", str(member.folder.path), *state.changed]
    return [str(job_file(sweep, member))]


def _start(sweep: Sweep, member: Member, command: Sequence[str], environment: Mapping[str, str]) -> _Launch:
    """In a session of its own, so that Ctrl-C at a terminal comes here alone and ends no rank before its checkpoint."""
    log = sweep.folder / "logs" / f"{member.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        offset = file.tell()
        _write_command(file, command)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    return _Launch(member, process, log, offset, time.monotonic())


def _write_command(file: IO[bytes], command: Sequence[str]) -> None:
    file.write(f"$ {shlex.join(command)}\n".encode())
    file.flush()


def _pass_on(running: Sequence[_Launch], count: int, say: Callable[[str], None]) -> None:
    for launch in running:
        while launch.signals < min(count, len(ESCALATION)):
            number = ESCALATION[launch.signals]
            launch.signals += 1
            if launch.process.poll() is None:
                launch.process.send_signal(number)
                say(f"{number.name:8}  {launch.member.name}")


def _outcome(launch: _Launch, stopping: bool) -> Outcome:
    member, code = launch.member, launch.process.returncode
    if member.folder.complete:
        return Outcome(member, "complete", code, log=launch.log)
    if code == REQUEUE or stopping:
        return Outcome(member, "stopped", code, log=launch.log)
    return Outcome(member, "failed", code, _last_words(launch), launch.log)


def _last_words(launch: _Launch) -> str:
    """The last line in which mpifed says what was wrong, or else the last line."""
    with launch.log.open("rb") as file:
        file.seek(launch.offset)
        lines = file.read().decode(errors="replace").splitlines()[1:]
    lines = [line.strip() for line in lines if line.strip()]
    ours = [line for line in lines if line.startswith("mpifed:")]
    return (ours or lines or ["no output"])[-1].removeprefix("mpifed: ")


def _line(outcome: Outcome, seconds: float) -> str:
    member = outcome.member
    if outcome.kind == "failed":
        return f"{'FAILED':8}  {member.name}  exit code {outcome.code}: {outcome.reason}"
    if outcome.kind == "stopped":
        return f"{'stopped':8}  {member.name}  after {duration(seconds)}"
    accuracy = number(member.folder.read_summary() or {}, "accuracy", "final")
    said = "" if accuracy is None else f"accuracy {percent(accuracy)} %, "
    return f"{'complete':8}  {member.name}  {said}{duration(seconds)}"
