"""Ranks that outlive others: MPI with ULFM (user-level failure mitigation), Open MPI 5 under `mpirun --with-ft ulfm`.

Where a rank dies in a collective, some of the others get an error from it. The first that does revokes the
communicator, so that all get one, which is `RanksDied`; then every rank that lives comes to `regroup`, and goes on in a
communicator of those ranks.

Two things that hold without ULFM do not here. A process that ends by itself with an exit code other than 0 is not
noticed, and `MPI_Abort` may hang: a rank that hangs is killed by a signal, and one that ends the job comes to the
others' `regroup` with its exit code, with which all leave. And `MPI_Finalize` may wait for the dead: the ranks leave by
`os._exit`, together.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from mpifed.comm.communicator import RanksDied
from mpifed.comm.mpi import LONGEST_SLEEP, Mpi
from mpifed.comm.routes import Nodes
from mpifed.output import say

P = ParamSpec("P")
T = TypeVar("T")

LEAVING_S = 10.0
"""Seconds that a rank waits for the others before it leaves, with which it has agreed to."""
_CODE = 0xFF
_READY = 0x100


def _noticing(collective: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """The same, raising `RanksDied` on every rank where MPI has an error on one of them."""

    @wraps(collective)
    def noticed(self: Ulfm, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return collective(self, *args, **kwargs)
        except self._mpi.Exception as error:
            self._broken.append(error)
            self._revoke()
            raise RanksDied(str(error)) from None

    return noticed


class Ulfm(Mpi):
    """A communicator that can lose ranks. Ranks are numbered anew by `regroup`; `launched` keeps the launcher's."""

    survives = True

    broadcast = _noticing(Mpi.broadcast)
    gather = _noticing(Mpi.gather)
    scatter = _noticing(Mpi.scatter)
    reduce = _noticing(Mpi.reduce)
    sum_everywhere = _noticing(Mpi.sum_everywhere)
    barrier = _noticing(Mpi.barrier)

    def __init__(self) -> None:
        super().__init__()
        self._broken: list[Exception] = []  # with the buffers of messages that may still be under way
        self._agreed = False  # or not: whether this communicator's only agreement has been

    def check(self) -> None:
        if self._comm.Is_revoked() or self._comm.Get_failed().Get_size() > 0:
            self._revoke()
            raise RanksDied("a rank has died")

    def finish(self) -> None:
        """By an agreement, as a barrier may end well on one rank and with an error on another."""
        if not self._agree(1):
            raise RanksDied("a rank has died, or an error has ended it")
        self.waiting(False)

    def meet(self, seconds: float) -> bool:
        return self._poll(self._meeting.Ibarrier, seconds)

    def regroup(self) -> list[int]:
        before = self._comm.Get_group()
        code = self._meet_the_living(0)
        if code:
            self.leave(code)
        group = self._comm.Get_group()
        alive = group.Translate_ranks(list(range(group.size)), before)
        died = sorted(set(range(before.size)) - set(alive))
        launched = [self.launched[rank] for rank in died]
        self.launched = [self.launched[rank] for rank in alive]
        self.rank, self.size = self._comm.rank, self._comm.size
        self.nodes, self.moved = Nodes((tuple(range(self.size)),)), lambda labels: None  # as before the first start
        self.handle = 0  # what counts by the ranks of the world counts for nobody now
        self.waiting(False)
        return launched

    def abort(self, code: int) -> None:
        """End the job with the others, who come here at their next exchange; a thread beside a hung one ends the rank
        alone, and the others go on without it."""
        if threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGKILL)
        self.leave(self._meet_the_living(code) or code)

    def leave(self, code: int) -> int:
        self._poll(self._meeting.Ibarrier, LEAVING_S)  # however it ends: who leaves first seems dead to the others
        for stream in (sys.stdout, sys.stderr):
            say("", stream)
        os._exit(code)

    # --- among the living ---------------------------------------------------------------------------------------------
    def _revoke(self) -> None:
        """Every rank's collective of this communicator, now or later, ends with an error."""
        self.waiting(False)
        try:
            self._comm.Revoke()
        except self._mpi.Exception:
            pass  # it is revoked

    def _meet_the_living(self, code: int) -> int:
        """Make `_comm` one of the ranks that live, which all come here, with 0 to go on, or with an exit code to end
        the job: then that code, on all of them."""
        self._revoke()
        if not self._agreed:
            self._agree(0)  # which waits asleep until all are here, as Shrink does not
        self.waiting(True)
        comm: Any = self._comm
        while True:
            comm, ready = comm.Shrink(), 0
            try:
                meeting = comm.Dup()
                ready = _READY
            except self._mpi.Exception:  # another one died
                pass
            try:
                agreed = comm.Agree(ready | (_CODE ^ code))  # a bitwise and, the same on all
            except self._mpi.Exception:
                agreed = 0
            if agreed & _READY:
                self._comm, self._meeting, self._agreed = comm, meeting, False
                return int(_CODE ^ (agreed & _CODE))
            try:
                comm.Revoke()
            except self._mpi.Exception:
                pass

    def _agree(self, fine: int) -> bool:
        """Whether all ranks have said 1 and none has died: the same on all that live. Once for each communicator, as
        agreements are told apart by their order alone."""
        self._agreed = True
        said = np.array([fine], np.int32)
        return self._poll(lambda: self._comm.Iagree(said), None) and bool(said[0])

    def _poll(self, start: Callable[[], Any], seconds: float | None) -> bool:
        """Whether a collective ends well within that time; one that ends in an error has ended badly."""
        self.waiting(True)
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            request = start()
            while not request.Test():
                if deadline is not None and time.monotonic() > deadline:
                    return False
                time.sleep(LONGEST_SLEEP)
        except self._mpi.Exception:
            return False
        return True
