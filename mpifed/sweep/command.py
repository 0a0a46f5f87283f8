"""`python -m mpifed sweep SWEEP [--run | --index K]`: list the members of a sweep, or run what is not complete."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from mpifed.errors import COMPLETE, REQUEUE, UNEXPECTED, BadInput
from mpifed.job import Job
from mpifed.output import say
from mpifed.sweep.launch import Outcome, job_file, launcher_command, run_members
from mpifed.sweep.plan import Member, Sweep, read_sweep, shown
from mpifed.sweep.state import State, state_of, validate


def main(argv: Sequence[str]) -> int:
    """List or run; the exit code: 0, or 75 where a signal stopped it, or that of the members that failed (1 where
    they differ).

    Raises `BadInput` where the sweep, or the job of a member, cannot be used; nothing is started then.
    """
    arguments = _arguments(argv)
    sweep = read_sweep(arguments.sweep, arguments.out)
    members = sweep.select(arguments.only)
    if arguments.index is not None:
        if not 0 <= arguments.index < len(sweep.members):
            raise BadInput(f"--index: {arguments.index} is not from 0 to {len(sweep.members) - 1}")
        members = [sweep.members[arguments.index]]
    jobs = validate(members)
    states = [(member, state_of(member, jobs[member.name])) for member in members]
    if arguments.run or arguments.index is not None:
        return _run(sweep, states, jobs, arguments)
    _print(_listing(sweep, states))
    return COMPLETE


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mpifed sweep", description=__doc__.split(": ", 1)[1])
    parser.add_argument("sweep", metavar="SWEEP", help="a sweep file (TOML), or the folder of a sweep")
    parser.add_argument("--run", action="store_true", help="run the members that are new, go on with the unfinished")
    parser.add_argument("--index", metavar="K", type=int, help="run this member alone, by its number in the list")
    parser.add_argument(
        "--only", metavar="PATTERN", action="append", default=[], help="members of these names: --only 'fedprox-*'"
    )
    parser.add_argument("--parallel", metavar="N", type=_positive, help="members at once (default: as the sweep says)")
    parser.add_argument("--ranks", metavar="N", type=_positive, help="MPI ranks of each (default: as the sweep says)")
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        default="mpirun",
        help="starts a member, with -n RANKS after it: 'srun --exact'",
    )
    parser.add_argument("--out", metavar="DIR", default="", help="another folder for the members")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


# --- the list ---------------------------------------------------------------------------------------------------------
def _listing(sweep: Sweep, states: Sequence[tuple[Member, State]]) -> str:
    """A line a member: number, name, state, what it sets."""
    width = max(len(member.name) for member, _ in states)
    room = max((len(state.text) for _, state in states if state.kind != "conflict"), default=0)
    digits = len(str(len(sweep.members) - 1))
    lines = [
        f"{member.index:{digits}}  {member.name:{width}}  {state.text:{room}}  "
        + " ".join(f"{key}={shown(value)}" for key, value in member.overrides.items())
        for member, state in states
    ]
    counts = Counter(state.kind for _, state in states)
    said = ", ".join(f"{counts[kind]} {kind}" for kind in ("complete", "unfinished", "new", "conflict") if counts[kind])
    lines.append(f"{len(states)} of {len(sweep.members)} members in {sweep.folder}: {said}")
    return "\n".join(line.rstrip() for line in lines)


# --- the run ----------------------------------------------------------------------------------------------------------
def _run(
    sweep: Sweep, states: Sequence[tuple[Member, State]], jobs: dict[str, Job], arguments: argparse.Namespace
) -> int:
    conflicts = [f"{member.folder.path} holds {state.text}" for member, state in states if state.kind == "conflict"]
    if conflicts:
        advice = "choose another folder with out or --out, remove what is there, or leave it out with --only"
        raise BadInput("\n".join([*conflicts, advice]))
    launcher = launcher_command(arguments.launcher)
    due = [(member, state) for member, state in states if state.kind != "complete"]
    if not due:
        _print(f"{_members(len(states))} in {sweep.folder}: all complete")
        return COMPLETE
    try:
        _write_files(sweep, [member for member, _ in due], jobs)
        outcomes = run_members(
            sweep, due, launcher, arguments.parallel or sweep.settings.parallel, arguments.ranks, _print
        )
    except OSError as error:
        raise BadInput(f"out: cannot write {error.filename or sweep.folder} ({error.strerror})") from None
    _print(_closing(sweep, outcomes, len(states) - len(due)))
    return _exit_code(outcomes)


def _write_files(sweep: Sweep, members: Sequence[Member], jobs: dict[str, Job]) -> None:
    """What a report and the members read: the sweep itself and the validated jobs."""
    (sweep.folder / "jobs").mkdir(parents=True, exist_ok=True)
    sweep.save()
    for member in members:
        job_file(sweep, member).write_text(jobs[member.name].to_toml(), encoding="utf-8")


def _closing(sweep: Sweep, outcomes: Sequence[Outcome], before: int) -> str:
    """The last lines: how many of each kind, which failed and where their logs are, and what to do next."""
    counts = Counter(outcome.kind for outcome in outcomes)
    counts["complete"] += before
    said = [f"{counts[kind]} {kind}" for kind in ("complete", "failed", "stopped", "not started") if counts[kind]]
    lines = [f"{_members(len(outcomes) + before)} in {sweep.folder}: {', '.join(said)}"]
    for outcome in outcomes:
        if outcome.kind == "failed":
            lines.append(f"failed: {outcome.member.name} (exit code {outcome.code}), log: {outcome.log}")
    if counts["stopped"] or counts["not started"]:
        lines.append("start the sweep again to go on")
    lines.append(f"python -m mpifed report {sweep.folder}")
    return "\n".join(lines)


def _exit_code(outcomes: Sequence[Outcome]) -> int:
    if any(outcome.kind in ("stopped", "not started") for outcome in outcomes):
        return REQUEUE
    codes = {outcome.code for outcome in outcomes if outcome.kind == "failed"}
    if not codes:
        return COMPLETE
    code = codes.pop() if len(codes) == 1 else UNEXPECTED
    return code if 0 < code < 256 else UNEXPECTED  # 0 without a summary, or a launcher that a signal killed


def _members(count: int) -> str:
    return f"{count} member{'s' if count != 1 else ''}"


def _print(text: str) -> None:
    say(text + "\n", sys.stdout)
