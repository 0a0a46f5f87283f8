"""The collectives that mpifed uses: on buffers, polled, counted, and cut into chunks that every MPI library can send.

A `Communicator` counts the bytes of the buffers that it is handed, by label, and cuts them; what moves them is one of
its two implementations, MPI (`mpifed.comm.mpi`) or threads of one process (`mpifed.comm.inprocess`), where one thread
is also the communicator of a run without MPI. Nothing is pickled. The root of every collective is rank 0.

What goes to or comes from rank 0 may be sent along a route of its own (`mpifed.comm.routes`), from rank to rank; each
of these messages is then a buffer that is handed to MPI, and counted where it is sent and where it is received.
"""

from __future__ import annotations

import json
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mpifed.comm import relay
from mpifed.comm.routes import Nodes, Route, Tree, tree_of

Buffer = npt.NDArray[Any]
Kinds = Mapping[str, int]
"""How many bytes of a fused buffer belong to each label."""

CONTROL = "control"
"""The label of what mpifed itself says: sizes, verdicts, stop flags, times."""


class Traffic:
    """MPI bytes of one rank by label: the lengths of the buffers that it handed to collectives, to send or to fill."""

    def __init__(self) -> None:
        self.sent: dict[str, int] = {}
        self.received: dict[str, int] = {}

    def count(self, sent: Kinds | None = None, received: Kinds | None = None) -> None:
        for totals, kinds in ((self.sent, sent), (self.received, received)):
            for label, size in (kinds or {}).items():
                totals[label] = totals.get(label, 0) + size

    def take(self) -> tuple[dict[str, int], dict[str, int]]:
        """(sent, received) since the last call."""
        taken = self.sent, self.received
        self.sent, self.received = {}, {}
        return taken


class RanksDied(Exception):
    """Some ranks have died, and those that live all know; `Communicator.regroup` goes on without the dead."""


class Communicator(ABC):
    """Ranks `0 .. size-1` that call the same collectives in the same order."""

    chunk_bytes = 1 << 30
    """Most bytes of one MPI call: element counts stay below 2^31 on every library."""

    piece_bytes = 1 << 20
    """Most bytes that are passed on at a time along a route (and no more than `chunk_bytes`)."""

    handle = 0
    """Address of the MPI library's handle of all ranks; 0 where the ranks are threads of one process."""

    peers: relay.Peers
    """Messages from rank to rank, for routes."""

    survives = False
    """Whether a rank's death ends neither the job nor the others: every collective may raise `RanksDied`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.launched = list(range(size))
        """The numbers that the launcher gave the ranks."""
        self.traffic = Traffic()
        self.waiting: Callable[[bool], None] = lambda begins: None
        """Called with True when this rank begins to wait for others, and with False when it goes on."""
        self.moved: Callable[[Iterable[str]], None] = lambda labels: None
        """Called after every collective, with the labels of what it carried."""
        self.nodes = Nodes((tuple(range(size)),))
        """Which ranks share a node; all, until `find_nodes` has been called."""

    # --- what an implementation provides; each call moves at most `chunk_bytes` ---------------------------------------
    @abstractmethod
    def _broadcast(self, buffer: Buffer) -> None: ...

    @abstractmethod
    def _gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int]) -> None: ...

    @abstractmethod
    def _scatter(self, send: Buffer | None, receive: Buffer, counts: Sequence[int]) -> None: ...

    @abstractmethod
    def _reduce(self, send: Buffer, receive: Buffer | None) -> None: ...

    @abstractmethod
    def _allreduce(self, send: Buffer, receive: Buffer) -> None: ...

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has come here."""

    @abstractmethod
    def meet(self, seconds: float) -> bool:
        """Whether every rank comes here within that time. To be called last: after False nothing but `abort` is left,
        as another rank waits in a collective that this one will never join."""

    def library(self) -> str:
        """What moves the bytes, one line."""
        return "threads of one process"

    @abstractmethod
    def abort(self, code: int) -> None:
        """End the whole job at once, with this exit code."""

    # --- where ranks are ----------------------------------------------------------------------------------------------
    def host(self) -> str:
        """The name of this rank's node."""
        return socket.gethostname()

    def find_nodes(self) -> list[str]:
        """The host of every rank, on every rank; from here on `nodes` are these. Collective."""
        said = self.gather_bytes(self.host().encode())
        hosts: list[str] = self.broadcast_json([name.decode() for name in said] if said is not None else None)
        self.nodes = Nodes.of(hosts)
        return hosts

    def _tree(self, route: Route, parts: bool = False) -> Tree:
        return tree_of(route, self.nodes, parts)

    @property
    def _piece(self) -> int:
        return min(self.piece_bytes, self.chunk_bytes)

    # --- the death of ranks (`mpifed.comm.ulfm`) ----------------------------------------------------------------------
    def check(self) -> None:  # noqa: B027  (elsewhere there is nothing to know)
        """Raise `RanksDied` where this rank can know of it without waiting."""

    def finish(self) -> None:
        """Return when every rank has come here with nothing left to do; on all of them, or `RanksDied` on all."""
        self.barrier()

    def regroup(self) -> list[int]:
        """After `RanksDied`, on every rank that lives: this communicator becomes one of those ranks, in their order.

        Returns the dead by the numbers that the launcher gave them. Where a rank ends the job meanwhile, so does this.
        """
        raise NotImplementedError(f"{self.library()} does not go on without a rank")

    def leave(self, code: int) -> int:
        """To be returned by the process, the last that a rank asks of this; or the end of the process, with `code`."""
        return code

    # --- collectives --------------------------------------------------------------------------------------------------
    def broadcast(self, buffer: Buffer, kinds: Kinds, route: Route = "library") -> None:
        """Rank 0's `buffer` (contiguous, any dtype) arrives in every other rank's, of the same length."""
        flat = buffer.reshape(-1).view(np.uint8)
        if route == "library":
            copies = int(self.rank == 0)
            for start in range(0, flat.size, self.chunk_bytes):
                self._broadcast(flat[start : start + self.chunk_bytes])
        else:
            tree = self._tree(route)
            relay.broadcast(self.peers, tree, self.rank, flat, self._piece)
            copies = len(tree.children[self.rank])
        sent = {label: copies * size for label, size in kinds.items()}
        self.traffic.count(sent=sent if copies else None, received=kinds if self.rank else None)
        self.moved(kinds)

    def gather(
        self,
        send: Buffer,
        counts: Sequence[int],
        kinds: Kinds,
        received: Kinds | None = None,
        route: Route = "library",
        of_rank: Callable[[int], Kinds] | None = None,
    ) -> Buffer | None:
        """Every rank's bytes `send` (uint8 `[counts[rank]]`) to rank 0, in rank order; the others get None.

        `kinds` label what this rank sends, `received` what rank 0 receives; along a route `of_rank` says the same of
        any rank, as others may pass it on. Left out, everybody's bytes are of this rank's one label.
        """
        if route == "library":
            receive = self._gather_by_library(send, counts)
            self.traffic.count(sent=kinds, received=received if self.rank == 0 else None)
        else:
            tree = self._tree(route, parts=True)
            receive = relay.gather(self.peers, tree, self.rank, send, counts, self._piece)
            passed = [_kinds_of(other, counts, kinds, of_rank) for other in tree.below[self.rank]]
            for one in passed:
                self.traffic.count(received=one)
            for one in (kinds, *passed) if self.rank else ():
                self.traffic.count(sent=one)
        self.moved(kinds)
        return receive

    def _gather_by_library(self, send: Buffer, counts: Sequence[int]) -> Buffer | None:
        receive = np.empty(sum(counts), np.uint8) if self.rank == 0 else None
        if sum(counts) <= self.chunk_bytes:
            self._gather(send, receive, counts)
        else:  # piece by piece, so that neither a count nor a displacement outgrows an int
            step = max(1, self.chunk_bytes // self.size)
            starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
            for low in range(0, max(counts), step):
                pieces = [min(step, max(0, count - low)) for count in counts]
                part = np.empty(sum(pieces), np.uint8) if self.rank == 0 else None
                self._gather(send[low : low + pieces[self.rank]], part, pieces)
                if receive is not None and part is not None:
                    at = 0
                    for start, piece in zip(starts, pieces, strict=True):
                        receive[start + low : start + low + piece] = part[at : at + piece]
                        at += piece
        return receive

    def scatter(
        self,
        send: Buffer | None,
        counts: Sequence[int],
        kinds: Kinds,
        sent: Kinds | None = None,
        route: Route = "library",
        of_rank: Callable[[int], Kinds] | None = None,
    ) -> Buffer:
        """Rank 0's bytes (uint8 `[sum(counts)]`, in rank order) dealt out: every rank gets its `counts[rank]` bytes.

        `kinds` label what this rank receives, `sent` what rank 0 sends; `of_rank` as in `gather`.
        """
        if route == "library":
            receive = self._scatter_by_library(send, counts)
            self.traffic.count(received=kinds, sent=sent if self.rank == 0 else None)
        else:
            tree = self._tree(route, parts=True)
            receive = relay.scatter(self.peers, tree, self.rank, send, counts, self._piece)
            passed = [_kinds_of(other, counts, kinds, of_rank) for other in tree.below[self.rank]]
            for one in passed:
                self.traffic.count(sent=one)
            for one in (kinds, *passed) if self.rank else ():
                self.traffic.count(received=one)
        self.moved(kinds)
        return receive

    def _scatter_by_library(self, send: Buffer | None, counts: Sequence[int]) -> Buffer:
        receive = np.empty(counts[self.rank], np.uint8)
        if sum(counts) <= self.chunk_bytes:
            self._scatter(send, receive, counts)
        else:
            step = max(1, self.chunk_bytes // self.size)
            starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
            for low in range(0, max(counts), step):
                pieces = [min(step, max(0, count - low)) for count in counts]
                part = None
                if send is not None:
                    part = np.concatenate(
                        [send[start + low : start + low + piece] for start, piece in zip(starts, pieces, strict=True)]
                    )
                self._scatter(part, receive[low : low + pieces[self.rank]], pieces)
        return receive

    def reduce(
        self, values: Buffer, kinds: Kinds, route: Route = "library", gives: Sequence[bool] | None = None
    ) -> Buffer | None:
        """The sum over the ranks of `values` (float32 or float64, one axis) at rank 0; the others get None.

        `gives`, by rank: whether a rank's values are more than zeros; along a route those of others are not sent.
        """
        if values.dtype not in (np.float32, np.float64):
            raise TypeError(f"only float32 and float64 are added by MPI, not {values.dtype}")
        if route == "library":
            receive = self._reduce_by_library(values)
            self.traffic.count(sent=kinds, received=kinds if self.rank == 0 else None)
        else:
            tree, gives = self._tree(route), gives or [True] * self.size
            receive = relay.reduce(self.peers, tree, self.rank, values, gives, self._piece)
            heard = [any(gives[other] for other in (child, *tree.below[child])) for child in tree.children[self.rank]]
            for _ in range(sum(heard)):
                self.traffic.count(received=kinds)
            if self.rank and (gives[self.rank] or any(heard)):
                self.traffic.count(sent=kinds)
        self.moved(kinds)
        return receive

    def _reduce_by_library(self, values: Buffer) -> Buffer | None:
        receive = np.empty_like(values) if self.rank == 0 else None
        step = self.chunk_bytes // values.itemsize
        for start in range(0, values.size, step):
            self._reduce(values[start : start + step], None if receive is None else receive[start : start + step])
        return receive

    def sum_everywhere(self, values: Buffer, label: str = CONTROL) -> Buffer:
        """The sum over the ranks of `values` (float64), on every rank."""
        receive = np.empty_like(values)
        step = self.chunk_bytes // values.itemsize
        for start in range(0, values.size, step):
            self._allreduce(values[start : start + step], receive[start : start + step])
        self.traffic.count(sent={label: values.nbytes}, received={label: values.nbytes})
        self.moved((label,))
        return receive

    # --- small messages made of these ---------------------------------------------------------------------------------
    def broadcast_bytes(self, data: bytes | None, kind: str = CONTROL) -> bytes:
        """Rank 0's `data` on every rank."""
        length = np.array([len(data) if self.rank == 0 and data is not None else 0], np.int64)
        self.broadcast(length, {kind: length.nbytes})
        buffer = np.empty(int(length[0]), np.uint8)
        if self.rank == 0 and data is not None:
            buffer[:] = np.frombuffer(data, np.uint8)
        self.broadcast(buffer, {kind: buffer.nbytes})
        return buffer.tobytes()

    def gather_bytes(self, data: bytes, kind: str = CONTROL) -> list[bytes] | None:
        """Every rank's `data` in rank order at rank 0; the others get None."""
        return self.gather_bytes_and_sum(data, (), kind)[0]

    def gather_bytes_and_sum(
        self, data: bytes, numbers: Sequence[float], kind: str = CONTROL
    ) -> tuple[list[bytes] | None, Sequence[float]]:
        """The same, and on every rank the sums of `numbers`, which travel with the lengths of the data."""
        said = np.zeros(self.size + len(numbers), np.float64)
        said[self.rank], said[self.size :] = len(data), numbers
        said = self.sum_everywhere(said, kind)
        counts, sums = [int(length) for length in said[: self.size]], said[self.size :].tolist()
        buffer = self.gather(np.frombuffer(data, np.uint8), counts, {kind: len(data)}, {kind: sum(counts)})
        if buffer is None:
            return None, sums
        ends = np.cumsum(counts)
        return [buffer[end - count : end].tobytes() for end, count in zip(ends, counts, strict=True)], sums

    def agree(self, problem: str | None) -> str | None:
        """The first rank's problem, known to every rank; None where no rank has one."""
        said = self.gather_bytes((problem or "").encode())
        first = next(filter(None, said), b"") if said is not None else None
        return self.broadcast_bytes(first).decode() or None

    def gather_json(self, value: Any) -> list[Any] | None:
        """Every rank's JSON value in rank order at rank 0; the others get None."""
        said = self.gather_bytes(json.dumps(value).encode())
        return None if said is None else [json.loads(one) for one in said]

    def broadcast_json(self, value: Any, kind: str = CONTROL) -> Any:
        """Rank 0's JSON value on every rank."""
        return json.loads(self.broadcast_bytes(json.dumps(value).encode() if self.rank == 0 else None, kind))


def _kinds_of(rank: int, counts: Sequence[int], kinds: Kinds, of_rank: Callable[[int], Kinds] | None) -> Kinds:
    if of_rank is not None:
        return of_rank(rank)
    (label,) = kinds
    return {label: counts[rank]}
