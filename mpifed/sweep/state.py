"""Which jobs the members of a sweep are, and how far each has come: what its folder says, never a guess."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mpifed.errors import BadInput
from mpifed.job import Job, changed_keys, flatten, from_document, load, unhashed
from mpifed.sweep.plan import Member

SHOWN = 3
"""So many members, or keys, are named in a message; the rest are counted."""


@dataclass(frozen=True)
class State:
    """How far a member is: `text` for people; `changed`, for an unfinished one, what to override when it goes on."""

    kind: Literal["new", "unfinished", "complete", "conflict"]
    text: str
    changed: tuple[str, ...] = ()


def validate(members: Sequence[Member]) -> dict[str, Job]:
    """The validated job of every member by name. Raises `BadInput` with all faults, each with the members it is in."""
    jobs: dict[str, Job] = {}
    faults: dict[str, list[str]] = {}
    for member in members:
        try:
            jobs[member.name] = from_document(member.document)
        except BadInput as error:
            for line in str(error).splitlines():
                faults.setdefault(line, []).append(member.name)
    if faults:
        raise BadInput("\n".join(f"{line} (in {some(names)})" for line, names in faults.items()))
    return jobs


def some(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def state_of(member: Member, job: Job) -> State:
    """What the member's folder holds. `conflict`: a run of another job (`Job.sha256`), or something else."""
    folder = member.folder
    if not folder.path.exists() or (folder.path.is_dir() and not any(folder.path.iterdir())):
        return State("new", "new")
    if not folder.job.is_file():
        return State("conflict", "not a run folder: it is not empty and holds no job.toml")
    try:
        old = load(folder.job.read_text(encoding="utf-8"), [], str(folder.job))
    except (BadInput, OSError, UnicodeDecodeError) as error:
        return State("conflict", f"another job: {str(error).splitlines()[0]}")
    changed = changed_keys(old, job)
    if changed:
        listed = [f"{key} {json.dumps(was)}, not {json.dumps(now)}" for key, (was, now) in changed.items()]
        return State("conflict", f"another job: {some(listed)}")
    if folder.complete:
        return State("complete", "complete")
    try:
        rows = folder.read_metrics()
    except BadInput as error:
        return State("conflict", str(error))
    return State("unfinished", f"{rows[-1]['round'] if rows else 0} of {job.rounds} rounds", tuple(_moved(old, job)))


def _moved(old: Job, new: Job) -> Iterator[str]:
    """Overrides for what may change on the way, because it cannot change results: `device`, `data.root`, ..."""
    before, after = (dict(flatten(json.loads(job.canonical()))) for job in (old, new))
    for key, value in after.items():
        if unhashed(key) and key != "out" and before.get(key) != value:
            yield f"{key}={json.dumps(value)}"


# --- without validating: for a report, which does not import torch ----------------------------------------------------
def disagreement(member: Member, recorded: Mapping[str, Any]) -> str:
    """Where the tables of a run's `job.toml` say something else than the member's; empty where they agree.

    Only keys that the sweep gives are compared: defaults are not known here, and the run has them written out.
    """
    return some(list(_differences(member.document, recorded, "")))


def _differences(given: Any, recorded: Any, key: str) -> Iterator[str]:
    """What differs in nested values, with or without defaults filled in: `rounds 3, not 20`."""
    if unhashed(key):
        return
    if isinstance(given, dict) and isinstance(recorded, dict):
        for name, value in given.items():
            yield from _differences(value, recorded.get(name), f"{key}.{name}" if key else name)
    elif isinstance(given, list) and isinstance(recorded, list) and len(given) == len(recorded):
        for index, (value, found) in enumerate(zip(given, recorded, strict=True)):
            yield from _differences(value, found, f"{key}.{index}")
    elif isinstance(given, str) and isinstance(recorded, dict) and recorded.get("name") == given:
        return  # a component by its name alone, as `algorithm.base`
    elif given != recorded and given != {}:
        yield f"{key} {json.dumps(recorded, default=str)}, not {json.dumps(given, default=str)}"
