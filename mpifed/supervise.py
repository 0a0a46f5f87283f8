"""`mpifed supervise [options] -- mpirun -n N python -m mpifed.run JOB.toml ...`: start again until it is complete.

The command is started; where it ends before the run is complete, by a death, a crash or a hang, it is started again
with `--resume`, from the newest checkpoint. What starting again cannot cure ends it: bad input, too few replies, a
checkpoint that cannot be written or read (exit codes 2, 3, 4), and restarts in a row that save nothing new. An exit
code of 0 is not believed without a summary that says that the run is complete. SIGTERM, SIGUSR1 and Ctrl-C are passed
on as a request for a checkpoint and an end.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mpifed.errors import BAD_INPUT, CHECKPOINT, COMPLETE, REQUEUE, TOO_FEW_REPLIES, UNEXPECTED, BadInput
from mpifed.output import say
from mpifed.progress import duration
from mpifed.run import argument_parser, job_and_folder, new_folder
from mpifed.storage.run_folder import RunFolder
from mpifed.sweep.launch import ESCALATION, Signals

INCURABLE = {
    BAD_INPUT: "bad input",
    TOO_FEW_REPLIES: "too few replies",
    CHECKPOINT: "a checkpoint that cannot be written or read",
}
"""Exit codes after which another start would end the same way."""
POLL_S = 0.05
LEAVING_S = 30.0
"""Seconds for a command to end by itself: after its summary says that the run is complete; after a SIGTERM; for the
ranks to follow their launcher; for a rank on another node to let go of the run folder."""
LONGEST_WAIT_S = 300.0
PATIENCE = 4
"""Times the job's `round_timeout` without anything new in the run folder, and the command counts as hung."""
TOKEN = "MPIFED_SUPERVISED"
"""In the environment of every process of a start on this node."""
_COUNTS = ("-n", "-np", "--np")
_KILLED_BY_USR1 = (10, 138)
"""Before Python listens, the signal is the end of a rank; nothing is lost with it."""


def main(argv: Sequence[str]) -> int:
    """Supervise; the exit code: 0 for a complete run, else the last start's. Raises BadInput for a command that is no
    run of one job."""
    options, command = _arguments(argv)
    run = SupervisedRun.of(command)
    return Supervisor(run, options).supervise()


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="mpifed supervise",
        usage="mpifed supervise [options] -- mpirun -n N python -m mpifed.run JOB.toml ...",
        description=__doc__.split("\n\n", 1)[1],
    )
    parser.add_argument(
        "--restarts", metavar="N", type=int, default=3, help="restarts in a row without a new checkpoint (default 3)"
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        default=1.0,
        help="before a restart; doubled after each that saved nothing new, up to 5 minutes (default 1)",
    )
    parser.add_argument(
        "--patience",
        metavar="SECONDS",
        type=float,
        help=f"a command counts as hung when nothing in the run folder has changed for so long (default {PATIENCE} x "
        "the job's round_timeout)",
    )
    parser.add_argument("--restart-preempted", action="store_true", help="restart after exit code 75 as well")
    parser.add_argument(
        "--shrink", action="store_true", help="one rank fewer after each restart that saved nothing new"
    )
    if "--" not in argv:
        parser.parse_args(argv)  # --help, or what is wrong with the options
        raise BadInput("supervise: no command; give one after --, as in -- mpirun -n 11 python -m mpifed.run JOB.toml")
    at = list(argv).index("--")
    options = parser.parse_args(argv[:at])
    if options.restarts < 0 or options.wait < 0 or (options.patience is not None and options.patience <= 0):
        raise BadInput("supervise: --restarts and --wait are numbers from 0 on, --patience one above 0")
    return options, list(argv[at + 1 :])


# --- the command ------------------------------------------------------------------------------------------------------
@dataclass
class SupervisedRun:
    """A command that trains one job in one run folder.

    Args:
        launcher: everything up to `mpifed.run` or `mpifed run`.
        words: what follows, with the run folder named.
        resumes: whether they go on with a run that was there before.
        round_timeout: the job's, seconds.
    """

    launcher: list[str]
    words: list[str]
    resumes: bool
    folder: RunFolder
    round_timeout: float

    @classmethod
    def of(cls, command: Sequence[str]) -> SupervisedRun:
        """Raises BadInput where the command is no run, or its job cannot be used."""
        at = _end_of_launcher(command)
        launcher, words = list(command[:at]), list(command[at:])
        said = argument_parser().parse_intermixed_args(words)
        if said.dry_run:
            raise BadInput("supervise: --dry-run trains nothing; leave it out, or leave supervise out")
        job, resumed = job_and_folder(said.job, said.resume)
        if resumed is None and not job.out:  # so that the next start finds what this one makes
            folder = Path(new_folder(job))
            words.append(f"out={folder}")
        else:
            folder = resumed.path if resumed is not None else Path(job.out).expanduser()
        return cls(launcher, words, resumed is not None, RunFolder(folder), job.round_timeout)

    def command(self, fewer: int) -> list[str]:
        """The command of the next start, with so many ranks fewer than at first, but at least one."""
        launcher = [
            str(max(1, int(word) - fewer)) if before in _COUNTS and word.isdigit() else word
            for before, word in itertools.pairwise(["", *self.launcher])
        ]
        if self.resumes or not self.folder.job.exists():
            return launcher + self.words
        return [*launcher, "--resume", str(self.folder.path)]  # whose job.toml holds the overrides

    @property
    def saved(self) -> tuple[int, int]:
        """The newest checkpoint, by its name alone: its round, and its number among those of that round."""
        names = os.listdir(self.folder.checkpoints) if self.folder.checkpoints.is_dir() else []
        found = filter(None, (re.fullmatch(r"round_([0-9]+)(?:\.([0-9]+))?", name) for name in names))
        return max(((int(match[1]), int(match[2] or 0)) for match in found), default=(0, 0))

    def changed(self) -> float:
        """When something in the run folder last changed, seconds since the epoch."""
        places = (self.folder.path, self.folder.metrics, self.folder.checkpoints, self.folder.summary)
        return max(_modified(place) for place in places)


def _end_of_launcher(command: Sequence[str]) -> int:
    for at, word in enumerate(command):
        if word == "mpifed.run":
            return at + 1
        if Path(word).name == "mpifed" and command[at + 1 : at + 2] == ["run"]:
            return at + 2
    raise BadInput(
        f"supervise: '{shlex.join(command)}' is no run; give a command such as mpirun -n 11 python -m mpifed.run "
        "JOB.toml (a sweep goes on by itself when it is started again)"
    )


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# --- starts -----------------------------------------------------------------------------------------------------------
@dataclass
class _Start:
    """One start of the command, in a session of its own, so that Ctrl-C at a terminal comes to the supervisor alone."""

    run: SupervisedRun
    command: list[str]
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self._summary_before = _modified(self.run.folder.summary)
        self._began = time.time()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment = os.environ | {"PATH": path, TOKEN: self.token}
        program = shutil.which(self.command[0], path=path)
        if program is None:
            raise BadInput(f"supervise: there is no '{self.command[0]}' beside {sys.executable} or on PATH")
        self._process = subprocess.Popen(
            [program, *self.command[1:]], stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )

    @property
    def complete(self) -> bool:
        """Whether this start, and not an earlier one, has written that the run is complete."""
        return self.run.folder.complete and _modified(self.run.folder.summary) != self._summary_before

    def wait(self, signals: Signals, patience: float) -> tuple[int, str]:
        """The exit code, as a shell would have it, and what was done to end the command, if anything was."""
        passed_on, ended = 0, ""
        while self._process.poll() is None:
            while passed_on < min(signals.count, len(ESCALATION)):
                self._process.send_signal(ESCALATION[passed_on])
                passed_on += 1
            idle = time.time() - max(self._began, self.run.changed())
            if idle > patience:
                ended = f"nothing has changed in {self.run.folder.path} for {duration(idle)}"
            elif idle > LEAVING_S and self.complete:
                ended = "the run is complete, but its command does not end"
            if ended:
                self._end()
                break
            time.sleep(POLL_S)
        code = self._process.returncode
        self._end_what_is_left()
        return (128 - code if code < 0 else code), ended

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(LEAVING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _end_what_is_left(self) -> None:
        """Ranks on this node that outlived their launcher."""
        deadline = time.monotonic() + LEAVING_S / 3
        while (left := _processes(self.token)) and time.monotonic() < deadline + LEAVING_S:
            for pid in left if time.monotonic() > deadline else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)


def _processes(token: str) -> list[int]:
    """Living processes of this node with that token in their environment; none where there is no /proc."""
    mark, found = f"{TOKEN}={token}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile, or somebody else's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


# --- again and again --------------------------------------------------------------------------------------------------
class Supervisor:
    """Starts a run until it is complete, or until another start would be in vain."""

    def __init__(self, run: SupervisedRun, options: argparse.Namespace) -> None:
        self._run = run
        self._options = options
        self._patience = PATIENCE * run.round_timeout if options.patience is None else options.patience
        self._tell: Callable[[str], None] = lambda text: say(f"mpifed supervise: {text}\n", sys.stderr)

    def supervise(self) -> int:
        """The exit code of the last start; 0 where the run is complete, whatever the launcher said."""
        in_vain = fewer = 0
        with Signals().caught() as signals:
            while True:
                saved = self._run.saved
                start = _Start(self._run, self._run.command(fewer))
                code, ended = start.wait(signals, self._patience)
                how = ended or f"exit code {code}"
                if start.complete:
                    if code != COMPLETE:
                        self._tell(f"{how}, but {self._run.folder.summary} says that the run is complete")
                    return COMPLETE
                if code == COMPLETE:
                    code, how = UNEXPECTED, ended or "exit code 0, but the run is not complete"
                in_vain = 0 if self._run.saved > saved else in_vain + 1
                if signals.count and code in _KILLED_BY_USR1:
                    code = REQUEUE
                last = self._last_word(code, how, in_vain, bool(signals.count))
                if last is not None:
                    self._tell(last)
                    return code
                fewer += self._options.shrink and in_vain > 0
                self._pause(how, in_vain, signals)
                if signals.count:
                    self._tell("asked to leave between two starts")
                    return REQUEUE

    def _last_word(self, code: int, how: str, in_vain: int, asked_to_leave: bool) -> str | None:
        """Why there is no other start; None where there is one."""
        where = f"{how} after round {self._run.saved[0]} in {self._run.folder.path}"
        if asked_to_leave:
            return f"{where}, as asked to; not started again"
        if code in INCURABLE:
            return f"{where}: {INCURABLE[code]}, which another start does not cure"
        if code == REQUEUE and not self._options.restart_preempted:
            return f"{where}: it left before its end; start it again with --resume (--restart-preempted does)"
        if in_vain > self._options.restarts:
            starts = "1 start in a row has" if in_vain == 1 else f"{in_vain} starts in a row have"
            return f"{where}: {starts} saved nothing new; giving up (--restarts)"
        if not self._released():
            return f"{where}: a process on another node still holds the run folder; end it, then start again"
        return None

    def _released(self) -> bool:
        """Whether nobody holds the run folder, or soon does not: rank 0 may be on another node."""
        deadline = time.monotonic() + LEAVING_S
        while (occupied := self._run.folder.occupied) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return not occupied

    def _pause(self, how: str, in_vain: int, signals: Signals) -> None:
        wait = min(self._options.wait * 2 ** max(0, in_vain - 1), LONGEST_WAIT_S)
        vain = f"; nothing new was saved, restart {in_vain} of {self._options.restarts}" if in_vain else ""
        self._tell(f"{how} after round {self._run.saved[0]}: starting again in {duration(wait)}{vain}")
        if not self._run.folder.job.exists():
            self._run.folder.discard_draft()
        until = time.monotonic() + wait
        while time.monotonic() < until and not signals.count:
            time.sleep(POLL_S)
