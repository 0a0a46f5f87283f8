"""No hang: an error on any rank ends the whole job at once, with one traceback and a documented exit code.

An exception that leaves one rank would leave the others waiting for ever. So the program runs inside `guarded`, which
prints what happened and aborts the job; a watchdog thread does the same for a rank that computes too long without
coming to the next exchange; and, should that thread not get to run, `faulthandler` ends the process from C.
"""

from __future__ import annotations

import faulthandler
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

from mpifed.comm.communicator import Communicator, RanksDied
from mpifed.errors import UNEXPECTED, MpifedError
from mpifed.output import say

_LAST_RESORT = 30.0  # seconds after which faulthandler acts where the watchdog should have
_TOGETHER = 10.0  # seconds within which the other ranks come to an error that is everybody's


def end_job(comm: Communicator, code: int, message: str) -> None:
    """Print, wait until it is out, and end every rank."""
    say(message + "\n", sys.stderr)
    say("", sys.stdout)
    time.sleep(0.2)  # an abort can be faster than the pipe that carries the message
    comm.abort(code)


def guarded(comm: Communicator, main: Callable[[], int]) -> int:
    """`main()`'s exit code. A `MpifedError` that every rank raises is printed by rank 0 and returned; one that a rank
    has for itself (a state that cannot be read there) ends the job, and so does any other exception on any rank."""

    def thread_failed(failed: threading.ExceptHookArgs) -> None:
        text = "".join(traceback.format_exception(failed.exc_type, failed.exc_value, failed.exc_traceback))
        end_job(comm, UNEXPECTED, f"mpifed: a thread failed on rank {comm.rank}\n{text}")

    threading.excepthook = thread_failed
    try:
        return _or_ended_by_a_death(comm, main)
    except MpifedError as error:
        if not comm.meet(_TOGETHER):
            end_job(comm, error.exit_code, f"mpifed: rank {comm.rank}: {error}")
        if comm.rank == 0 and str(error):
            say(f"mpifed: {error}\n", sys.stderr)
        return error.exit_code
    except BaseException:  # SystemExit too: a rank that leaves by itself would leave the others waiting
        end_job(comm, UNEXPECTED, f"mpifed: an error on rank {comm.rank} ends the job\n{traceback.format_exc()}")
        return UNEXPECTED


def _or_ended_by_a_death(comm: Communicator, main: Callable[[], int]) -> int:
    """`main()`'s exit code. Where ranks die that it cannot do without, the others end together."""
    try:
        return main()
    except RanksDied:
        died = comm.regroup()
    raise MpifedError(f"{named(died)} died; the job ends (--resume goes on, from the last checkpoint)")


def named(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 3 and 5`."""
    return f"rank{'s' * (len(ranks) > 1)} {' and '.join(map(str, ranks))}"


class Watchdog:
    """Ends the job when this rank computes for more than `limit` seconds without coming to the next exchange.

    `waiting(True)` pauses it: whoever waits for a hung rank is not the one that hangs.
    """

    def __init__(self, comm: Communicator, limit: float) -> None:
        self._comm = comm
        self._limit = limit
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._watch, name="mpifed-watchdog", daemon=True)

    def start(self) -> None:
        self.waiting(False)
        self._thread.start()

    def waiting(self, begins: bool) -> None:
        """Called by the communicator when it begins to wait, and when it goes on."""
        if begins:
            self.stop()
        else:
            self._deadline = time.monotonic() + self._limit
            faulthandler.dump_traceback_later(self._limit + _LAST_RESORT, exit=not self._comm.survives)
            if self._comm.survives:  # the others notice a death by a signal only
                signal.setitimer(signal.ITIMER_REAL, self._limit + _LAST_RESORT + 1)

    def stop(self) -> None:
        self._deadline = None
        faulthandler.cancel_dump_traceback_later()
        if self._comm.survives:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _watch(self) -> None:
        while True:
            time.sleep(min(0.5, self._limit / 4))
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                rank, limit = self._comm.rank, self._limit
                say(
                    f"mpifed: rank {rank} came to no exchange for {limit:g} s (round_timeout); its stacks:\n",
                    sys.stderr,
                )
                faulthandler.dump_traceback(all_threads=True)
                then = "is ended" if self._comm.survives else "hangs, the job ends"
                end_job(self._comm, UNEXPECTED, f"mpifed: rank {self._comm.rank} {then}")


class Deadline:
    """The end of a run's time: near when another round, with its checkpoint, might not be done before it.

    How long those take is learnt from this start of the run: the longest so far, half as much again, and `LEAVING_S`.

    Args:
        at: seconds since the epoch; infinity for a run that has all the time there is.
    """

    LEAVING_S = 10.0
    """Seconds for what comes after the last checkpoint: the files of the run, the launcher's end, the requeue."""
    MARGIN = 1.5

    def __init__(self, at: float = math.inf) -> None:
        self.at = at
        self._round = 0.0
        self._checkpoint: float | None = None

    @classmethod
    def of(cls, started: float, time_limit: float, environment: Mapping[str, str]) -> Deadline:
        """`time_limit` seconds (0: none) after `started`, or the end of the Slurm job where that comes first."""
        end = environment.get("SLURM_JOB_END_TIME", "")
        ends = [started + time_limit] if time_limit else []
        return cls(min([*ends, float(end)] if end.isdigit() else ends, default=math.inf))

    def round_took(self, seconds: float) -> None:
        """A round took so long, up to the beginning of the next one."""
        self._round = max(self._round, seconds)

    def checkpoint_took(self, seconds: float) -> None:
        """A checkpoint took so long."""
        self._checkpoint = max(self._checkpoint or 0.0, seconds)

    def near(self, seconds: float) -> bool:
        """Whether to leave after this round, which has taken so long, with a checkpoint."""
        longest = max(self._round, seconds)
        checkpoint = longest if self._checkpoint is None else self._checkpoint
        return time.time() + self.MARGIN * (longest + checkpoint) + self.LEAVING_S > self.at


class StopSignal:
    """USR1 and TERM ask for a checkpoint and an end at the next round's boundary; they only set a flag."""

    def __init__(self) -> None:
        self.asked = False

    def install(self) -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
