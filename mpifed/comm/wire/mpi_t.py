"""MPI_T: Open MPI's own counters of what it sent to each rank, the messages within its collectives included.

They exist where Open MPI was started with `pml_monitoring_enable` (`enable` sets it, before MPI starts). The counter is
`pml_monitoring_messages_size`, of messages that move; `coll_monitoring_*` is not read, which counts by formula (an
all-reduce of b bytes on n ranks as n(n-1)b). Headers are not in it; shared memory within a node is.

mpi4py has no MPI_T, but the library has: these are the functions of MPI 3.1, chapter 14.3, through ctypes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

from mpifed.comm.wire.source import Count, Counts, Flows, Unreadable, joined

VARIABLE = b"pml_monitoring_messages_size"
_CLASS_SIZE = 2
"""MPI_T_PVAR_CLASS_SIZE of Open MPI."""

SETTINGS = {
    "OMPI_MCA_pml_monitoring_enable": "1",
    # with monitoring and several ranks on several hosts, Open MPI 5.0's hierarchical collectives crash in MPI_Finalize
    "OMPI_MCA_coll": "^han",
}


def enable() -> None:
    """Have Open MPI count, from its start on; to be called before that. Other libraries do not look at it."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


class MpiT:
    """Counts of bytes sent by the rank to which they went.

    Args:
        communicator: address of `MPI_COMM_WORLD`'s handle.
        ranks: how many there are.
        library: the MPI library; None: the one that this process has loaded.
    """

    name = "mpi_t"

    def __init__(self, communicator: int, ranks: int, library: Any = None) -> None:
        self._library = _loaded() if library is None else library
        if not hasattr(self._library, "MPI_T_pvar_get_index"):
            raise Unreadable("the MPI library has no MPI_T")
        provided, index, length = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._session, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("MPI_T_init_thread", 0, ctypes.byref(provided))
        self._call("MPI_T_pvar_session_create", ctypes.byref(self._session))
        self._call("MPI_T_pvar_get_index", VARIABLE, _CLASS_SIZE, ctypes.byref(index))
        self._call(
            "MPI_T_pvar_handle_alloc",
            self._session,
            index,
            ctypes.c_void_p(communicator),
            ctypes.byref(self._handle),
            ctypes.byref(length),
        )
        if length.value != ranks:
            raise Unreadable(f"the MPI library counts for {length.value} ranks, not {ranks}")
        self._call("MPI_T_pvar_start", self._session, self._handle)
        self._values = (ctypes.c_ulonglong * ranks)()

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code != 0:
            raise Unreadable(
                f"the MPI library does not count its messages ({function} gives {code}); Open MPI does with "
                "OMPI_MCA_pml_monitoring_enable=1 in the environment from its start on"
            )

    def read(self) -> Counts:
        self._call("MPI_T_pvar_read", self._session, self._handle, self._values)
        return {str(rank): Count(sent) for rank, sent in enumerate(self._values)}

    def join(self, known: Sequence[Sequence[str]], counts: Sequence[Counts]) -> tuple[list[Count], Flows]:
        sent = ((rank, int(name), count) for rank, own in enumerate(counts) for name, count in own.items())
        return joined(sent, len(counts))


def library_path() -> str:
    """The file of the MPI library that is in this process already. Raises Unreadable."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.rstrip("\n").split(" ", 5)[-1].strip() for line in maps}
        return min(path for path in paths if os.path.basename(path).startswith("libmpi.so"))
    except (OSError, ValueError) as error:
        raise Unreadable("the MPI library that this process uses was not found") from error


def _loaded() -> Any:
    """The MPI library that is in this process already. Raises Unreadable."""
    try:
        return ctypes.CDLL(library_path())
    except OSError as error:
        raise Unreadable("the MPI library that this process uses was not found") from error
