"""MPI through mpi4py: the only importer of mpi4py.

A rank that waits polls a non-blocking collective and sleeps in between, a twentieth of what it has waited, from 50 us
up to 2 ms and, after a quarter of a second, up to 5 ms, so that it leaves its core to the ranks that compute, whatever
the MPI library and its settings.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpifed.comm.communicator import Buffer, Communicator
from mpifed.comm.inprocess import InProcess
from mpifed.comm.launched import sizes
from mpifed.comm.wire.mpi_t import library_path
from mpifed.errors import BadInput

SHORTEST_SLEEP = 50e-6  # seconds
LONGEST_SLEEP = 5e-3
LONGEST_SLEEP_AT_FIRST = 2e-3
AT_FIRST = 0.25

REDUCED_BYTES = 4 << 20
"""Bytes that one blocking reduction adds: longer ones leave the caches (three times slower with MPICH)."""

_FAULT_TOLERANT = "OMPI_MCA_mpi_ft_enable"
"""Set to 1 by `mpirun --with-ft ulfm`."""


class Mpi(Communicator):
    """A duplicate of `MPI.COMM_WORLD`, on which only mpifed talks."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self._meeting = MPI.COMM_WORLD.Dup()  # a collective here is never taken for one of `_comm`'s
        super().__init__(self._comm.rank, self._comm.size)
        self.handle = int(MPI._addressof(MPI.COMM_WORLD))
        self.peers = _Peers(self)

    def library(self) -> str:
        """The MPI library's own name and version, one line."""
        return _first_line(self._mpi.Get_library_version())

    def _finish(self, request: Any) -> None:
        if not request.Test():
            self.waiting(True)
            started = time.perf_counter()
            while not request.Test():
                waited = time.perf_counter() - started
                longest = LONGEST_SLEEP_AT_FIRST if waited < AT_FIRST else LONGEST_SLEEP
                time.sleep(min(max(SHORTEST_SLEEP, waited / 20), longest))
        self.waiting(False)  # also where there was nothing to wait for: this rank has come to an exchange

    def _broadcast(self, buffer: Buffer) -> None:
        self._finish(self._comm.Ibcast([buffer, self._mpi.BYTE], root=0))

    def _gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int]) -> None:
        target = None if receive is None else [receive, list(counts), None, self._mpi.BYTE]
        self._finish(self._comm.Igatherv([send, self._mpi.BYTE], target, root=0))

    def _scatter(self, send: Buffer | None, receive: Buffer, counts: Sequence[int]) -> None:
        source = None if send is None else [send, list(counts), None, self._mpi.BYTE]
        self._finish(self._comm.Iscatterv(source, [receive, self._mpi.BYTE], root=0))

    def _reduce(self, send: Buffer, receive: Buffer | None) -> None:
        # Open MPI moves a non-blocking reduction on by a few KB a poll, 1 MB/s in all. So the ranks wait for each other
        # asleep, and reduce at full speed when all are there.
        self.barrier()
        step = REDUCED_BYTES // send.itemsize
        for start in range(0, send.size, step):
            part = None if receive is None else receive[start : start + step]
            self._comm.Reduce(send[start : start + step], part, op=self._mpi.SUM, root=0)

    def _allreduce(self, send: Buffer, receive: Buffer) -> None:
        self._finish(self._comm.Iallreduce(send, receive, op=self._mpi.SUM))

    def barrier(self) -> None:
        self._finish(self._comm.Ibarrier())

    def meet(self, seconds: float) -> bool:
        self.waiting(True)
        request = self._meeting.Ibarrier()
        deadline = time.monotonic() + seconds
        while not request.Test():
            if time.monotonic() > deadline:
                return False
            time.sleep(LONGEST_SLEEP)
        return True

    def abort(self, code: int) -> None:
        self._comm.Abort(code)


class _Peers:
    """Non-blocking messages on a communicator's own duplicate, polled as its collectives are."""

    def __init__(self, mpi: Mpi) -> None:
        self._mpi = mpi

    def send(self, buffer: Buffer, to: int) -> Any:
        return self._mpi._comm.Isend([buffer.view(np.uint8), self._mpi._mpi.BYTE], dest=to)

    def receive(self, buffer: Buffer, source: int) -> Any:
        return self._mpi._comm.Irecv([buffer.view(np.uint8), self._mpi._mpi.BYTE], source=source)

    def finish(self, request: Any) -> None:
        self._mpi._finish(request)


def _of_all_ranks() -> Mpi:
    """One that survives dead ranks, where the launcher and the MPI library do."""
    if os.environ.get(_FAULT_TOLERANT) == "1" and revokes():
        from mpifed.comm.ulfm import Ulfm

        return Ulfm()
    return Mpi()


def revokes() -> bool:
    """Whether the library can end a communicator in which a rank has died (ULFM)."""
    try:
        from mpi4py import MPI

        MPI.COMM_SELF.Dup().Revoke()
    except (ImportError, RuntimeError, NotImplementedError):  # MPI.Exception is a RuntimeError
        return False
    return True


def world() -> Communicator:
    """The communicator of this process: MPI, or one rank without MPI where no MPI library is installed.

    Raises BadInput where the launcher started several processes that do not see each other.
    """
    several = {name: size for name, size in sizes(os.environ).items() if size > 1}
    try:
        comm: Communicator = _of_all_ranks()
    except (ImportError, RuntimeError) as error:
        if several:
            reason = " ".join(str(error).split())  # mpi4py's is of several lines
            raise BadInput(
                f"no MPI library could be loaded ({reason}); install one: pip install 'mpifed[mpi]'"
            ) from None
        print("mpifed: no MPI library found, running on one rank (pip install 'mpifed[mpi]')", file=sys.stderr)
        return InProcess.alone()
    if comm.size == 1 and several:
        name, size = next(iter(several.items()))
        raise BadInput(
            f"the launcher started {size} processes ({name}) but each sees a world of one rank with {comm.library()}; "
            "use the mpirun of the MPI library that mpi4py has loaded, or srun with its --mpi type"
        )
    return comm


# --- for `mpifed doctor` ----------------------------------------------------------------------------------------------
def installed() -> dict[str, str]:
    """The MPI library (`library`, `path`), the `standard` that it follows and `mpi4py`, without starting MPI.

    In a process that starts it neither before nor after. Raises ImportError or RuntimeError where there is no library.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    major, minor = MPI.Get_version()
    return {
        "library": " ".join(_first_line(MPI.Get_library_version()).split()),
        "standard": f"{major}.{minor}",
        "mpi4py": mpi4py.__version__,
        "path": library_path(),
    }


def broadcast_in_place(buffer: Any) -> int:
    """Rank 0's `buffer`, which may lie in a GPU's memory, on every rank; this rank's number. None is not sent.

    A library that cannot may end the process.
    """
    from mpi4py import MPI

    if buffer is not None:
        MPI.COMM_WORLD.Bcast(buffer, root=0)
    return int(MPI.COMM_WORLD.rank)


def _first_line(version: str) -> str:
    return version.strip("\x00 \n").splitlines()[0].strip()
