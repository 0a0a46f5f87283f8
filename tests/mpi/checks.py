"""What every communicator must do: each check is a function of a communicator that all its ranks call together.

`test_checks.py` runs every one of them on threads of one process, under an `mpirun` that it starts, and on the
world of a `mpirun -n 4 python -m pytest --with-mpi`. Data is a function of the rank, so that every rank can work out
what every other one should have: the expected values are computed next to the collective, without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from mpifed.comm.communicator import CONTROL, Buffer, Communicator
from mpifed.comm.relay import Peers
from mpifed.comm.routes import Nodes, Route

Check = Callable[[Communicator], None]
SIZES = (0, 1, 7, 60)


def data(rank: int, size: int) -> Buffer:
    """Bytes that tell rank and position: uint8 `[size]`."""
    return ((np.arange(size) * 7 + 31 * rank + 1) % 251).astype(np.uint8)


def uneven(size: int) -> list[int]:
    """Counts by rank that differ and hold zeros: 0, 5, 10, 3, 8, 1, 6, ..."""
    return [5 * rank % 12 for rank in range(size)]


@contextmanager
def chunks(comm: Communicator, nbytes: int) -> Iterator[None]:
    """Messages are cut into pieces of `nbytes`."""
    comm.chunk_bytes = nbytes
    try:
        yield
    finally:
        del comm.chunk_bytes


@contextmanager
def on_nodes(comm: Communicator, hosts: list[str]) -> Iterator[None]:
    """The ranks pretend to be on these nodes."""
    usual, comm.nodes = comm.nodes, Nodes.of(hosts)
    try:
        yield
    finally:
        comm.nodes = usual


def every_route(comm: Communicator) -> Iterator[Route]:
    """Every route but the library's, by node on one node, on nodes of three ranks, dealt by turns, and one each."""
    yield from ("flat", "tree", "hierarchical")
    for node_of in (lambda rank: rank // 3, lambda rank: rank % 2, lambda rank: rank):
        with on_nodes(comm, [f"node{node_of(rank)}" for rank in range(comm.size)]):
            yield "hierarchical"


@contextmanager
def pieces(comm: Communicator, nbytes: int) -> Iterator[None]:
    """Along routes, so many bytes are passed on at a time."""
    comm.piece_bytes = nbytes
    try:
        yield
    finally:
        del comm.piece_bytes


# --- one collective each ----------------------------------------------------------------------------------------------
def broadcast(comm: Communicator) -> None:
    for size in SIZES:
        for dtype in (np.uint8, np.int64, np.float32):
            buffer = data(comm.rank, size).astype(dtype)
            comm.broadcast(buffer, {"m": buffer.nbytes})
            assert np.array_equal(buffer, data(0, size).astype(dtype)), (size, dtype)


def broadcast_of_several_axes(comm: Communicator) -> None:
    buffer = data(comm.rank, 24).reshape(2, 3, 4)
    comm.broadcast(buffer, {"m": 24})
    assert np.array_equal(buffer.reshape(-1), data(0, 24))


def gather(comm: Communicator) -> None:
    for counts in ([0] * comm.size, [3] * comm.size, uneven(comm.size), uneven(comm.size)[::-1]):
        received = comm.gather(data(comm.rank, counts[comm.rank]), counts, {"m": counts[comm.rank]})
        if comm.rank == 0:
            expected = np.concatenate([data(rank, count) for rank, count in enumerate(counts)])
            assert received is not None and np.array_equal(received, expected), counts
        else:
            assert received is None


def scatter(comm: Communicator) -> None:
    for counts in ([0] * comm.size, [3] * comm.size, uneven(comm.size), uneven(comm.size)[::-1]):
        whole = np.concatenate([data(rank, count) for rank, count in enumerate(counts)]) if comm.rank == 0 else None
        mine = comm.scatter(whole, counts, {"m": counts[comm.rank]})
        assert np.array_equal(mine, data(comm.rank, counts[comm.rank])), counts


def gather_undoes_scatter(comm: Communicator) -> None:
    counts = uneven(comm.size)
    whole = data(9, sum(counts))
    mine = comm.scatter(whole if comm.rank == 0 else None, counts, {})
    again = comm.gather(mine, counts, {})
    assert again is None or np.array_equal(again, whole)


def reduce(comm: Communicator) -> None:
    """The values are whole and small, so that the sum is exact whatever the order of the additions."""
    for size in SIZES:
        for dtype in (np.float32, np.float64):
            total = comm.reduce(data(comm.rank, size).astype(dtype), {"m": size})
            if comm.rank == 0:
                expected = sum(data(rank, size).astype(dtype) for rank in range(comm.size))
                assert total is not None and total.dtype == dtype and np.array_equal(total, expected), (size, dtype)
            else:
                assert total is None


def reduce_refuses_other_types(comm: Communicator) -> None:
    """bfloat16, float16 and integers travel as bytes: what MPI makes of them depends on the library."""
    for dtype in (np.int64, np.float16, np.uint8):
        try:
            comm.reduce(np.zeros(4, dtype), {})
        except TypeError as error:
            assert str(np.dtype(dtype)) in str(error)
        else:
            raise AssertionError(f"{dtype} was added by MPI")
    comm.barrier()


def sum_everywhere(comm: Communicator) -> None:
    for size in SIZES:
        total = comm.sum_everywhere(data(comm.rank, size).astype(np.float64))
        assert np.array_equal(total, sum(data(rank, size).astype(np.float64) for rank in range(comm.size))), size


def barrier(comm: Communicator) -> None:
    """Nobody leaves before the last has come. The clock is the machine's, the same for every process on it."""
    time.sleep(0.02 * comm.rank)
    came = time.monotonic()
    comm.barrier()
    left = time.monotonic()
    everybody = comm.gather_bytes(np.array([came, left]).tobytes())
    if everybody is not None:
        times = np.array([np.frombuffer(one, np.float64) for one in everybody])
        assert times[:, 1].min() >= times[:, 0].max()


# --- small messages ---------------------------------------------------------------------------------------------------
def broadcast_bytes(comm: Communicator) -> None:
    for said in (b"", b"x", b"\x00\xff" * 500):
        assert comm.broadcast_bytes(said if comm.rank == 0 else None) == said
    assert comm.broadcast_bytes(None) == b""


def broadcast_json(comm: Communicator) -> None:
    values: tuple[Any, ...] = (None, [], {"a": [1, 2.5, "naïve"]}, "x" * 2000)
    for value in values:
        assert comm.broadcast_json(value if comm.rank == 0 else "ignored") == value


def gather_bytes(comm: Communicator) -> None:
    for step in (0, 1, 17):
        said = comm.gather_bytes(b"%d" % comm.rank * (step * comm.rank))
        if comm.rank == 0:
            assert said == [b"%d" % rank * (step * rank) for rank in range(comm.size)]
        else:
            assert said is None


def agree(comm: Communicator) -> None:
    assert comm.agree(None) is None
    for troubled in range(comm.size):
        one = f"disk full on rank {comm.rank}" if comm.rank == troubled else None
        assert comm.agree(one) == f"disk full on rank {troubled}"
    assert comm.agree(f"disk full on rank {comm.rank}") == "disk full on rank 0"
    later = f"rank {comm.rank}" if comm.rank >= comm.size // 2 else None
    assert comm.agree(later) == f"rank {comm.size // 2}"


# --- along routes -----------------------------------------------------------------------------------------------------
def routes(comm: Communicator) -> None:
    """What arrives is what arrives by the library; in pieces of 40 bytes too, so that many are passed on."""
    for nbytes in (1 << 20, 40):
        with pieces(comm, nbytes):
            for route in every_route(comm):
                _arrives(comm, route)


def _arrives(comm: Communicator, route: Route) -> None:
    for size in SIZES:
        buffer = data(comm.rank, size).astype(np.int64)
        comm.broadcast(buffer, {"m": buffer.nbytes}, route)
        assert np.array_equal(buffer, data(0, size)), (route, size)
    for counts in ([0] * comm.size, [3] * comm.size, uneven(comm.size), [40 + count for count in uneven(comm.size)]):
        whole = np.concatenate([data(rank, count) for rank, count in enumerate(counts)])
        mine = {"m": counts[comm.rank]}
        received = comm.gather(data(comm.rank, counts[comm.rank]), counts, mine, {}, route)
        assert (received is None) == (comm.rank > 0)
        assert received is None or np.array_equal(received, whole), (route, counts)
        dealt = comm.scatter(whole if comm.rank == 0 else None, counts, mine, {}, route)
        assert np.array_equal(dealt, data(comm.rank, counts[comm.rank])), (route, counts)


def reduce_along_routes(comm: Communicator) -> None:
    """Whole and small values, so exact in any order; also where some ranks, or all, or all of a node give nothing."""
    with pieces(comm, 40):
        for route in every_route(comm):
            for gives in ([True] * comm.size, [rank % 3 == 1 for rank in range(comm.size)], [False] * comm.size):
                for size in SIZES:
                    for dtype in (np.float32, np.float64):
                        values = [data(rank, size).astype(dtype) * gives[rank] for rank in range(comm.size)]
                        mine = values[comm.rank].copy()
                        total = comm.reduce(mine, {"m": mine.nbytes}, route, gives)
                        assert np.array_equal(mine, values[comm.rank])  # a rank's own values stay as they are
                        assert (total is None) == (comm.rank > 0)
                        if total is not None:
                            assert total.dtype == dtype and np.array_equal(total, sum(values)), (route, gives, size)


def routes_send_what_is_counted(comm: Communicator) -> None:
    """What a rank hands to MPI, to send and to fill, is what is counted, label by label; every byte that somebody sends
    is received by somebody."""
    counts = uneven(comm.size)
    of_rank = [{"a": count // 2, "b": count - count // 2} for count in counts]
    everyone = {label: sum(kinds[label] for kinds in of_rank) for label in "ab"}
    whole, mine = data(0, sum(counts)) if comm.rank == 0 else None, of_rank[comm.rank]
    for route in every_route(comm):
        comm.traffic.take()
        with pieces(comm, 64), recorded(comm) as calls:
            comm.broadcast(data(0, 100), {"a": 60, "b": 40}, route)
            comm.gather(data(comm.rank, counts[comm.rank]), counts, mine, everyone, route, of_rank.__getitem__)
            comm.scatter(whole, counts, mine, everyone, route, of_rank.__getitem__)
            comm.reduce(np.zeros(10), {"a": 80}, route, [rank % 2 == 1 for rank in range(comm.size)])
        sent, received = comm.traffic.take()
        assert {name for name, _, _ in calls} <= {"send", "receive"}, "a route uses none of the library's collectives"
        assert sum(sent.values()) == sum(call[1] for call in calls), route
        assert sum(received.values()) == sum(call[2] for call in calls), route
        for label in "ab":
            totals = comm.sum_everywhere(np.array([sent.get(label, 0), received.get(label, 0)], np.float64))
            assert totals[0] == totals[1], (route, label)


def one_crossing_for_a_node(comm: Communicator) -> None:
    """Two nodes, ranks dealt to them by turns: between them go one copy down and one sum up, of 800 bytes each, and
    every gathered byte of the other node's ranks once; by the flat route one for each of its ranks."""
    far = comm.size // 2
    for route, copies in (("flat", far), ("hierarchical", min(1, far))):
        with on_nodes(comm, [f"node{rank % 2}" for rank in range(comm.size)]):
            with recorded(comm, partners=True) as down:
                comm.broadcast(np.zeros(100), {"m": 800}, route)
            with recorded(comm, partners=True) as up:
                comm.reduce(np.zeros(100), {"m": 800}, route)
            with recorded(comm, partners=True) as parts:
                comm.gather(data(comm.rank, 100), [100] * comm.size, {"m": 100}, {}, route)
        crossed = [
            sum(sent for name, sent, _ in calls if sent and int(name.split()[1]) % 2 != comm.rank % 2)
            for calls in (down, up, parts)
        ]
        totals = comm.sum_everywhere(np.array(crossed, np.float64))
        assert totals.tolist() == [800 * copies, 800 * copies, 100 * far], route


# --- large messages are cut -------------------------------------------------------------------------------------------
def small_chunks_change_nothing(comm: Communicator) -> None:
    """Every collective once more in pieces: of one float64, of no multiple of it, and of exactly the message."""
    for nbytes in (8, 60, 480):
        with chunks(comm, nbytes):
            for check in (broadcast, gather, scatter, reduce, sum_everywhere, gather_bytes, agree):
                check(comm)


def no_call_moves_more_than_a_chunk(comm: Communicator) -> None:
    """And small chunks really cut: 100 float64 are 800 bytes, 13 pieces of 64 or less."""
    with chunks(comm, 64), recorded(comm) as calls:
        comm.broadcast(np.zeros(100), {})
        comm.reduce(np.zeros(100), {})
        comm.sum_everywhere(np.zeros(100))
        comm.gather(data(0, 100), [100] * comm.size, {})
        comm.scatter(data(0, 100 * comm.size) if comm.rank == 0 else None, [100] * comm.size, {})
    assert max(max(sent, received) for _, sent, received in calls) <= 64
    assert [name for name, _, _ in calls].count("_broadcast") == 13


# --- counting ---------------------------------------------------------------------------------------------------------
class Watched:
    """A rank's messages to others, written down in `calls`; with `partners`, the other rank is part of the name."""

    def __init__(self, peers: Peers, calls: list[tuple[str, int, int]], partners: bool) -> None:
        self._peers, self._calls, self._partners = peers, calls, partners

    def send(self, buffer: Buffer, to: int) -> Any:
        self._calls.append((f"send {to}" if self._partners else "send", buffer.nbytes, 0))
        return self._peers.send(buffer, to)

    def receive(self, buffer: Buffer, source: int) -> Any:
        self._calls.append((f"receive {source}" if self._partners else "receive", 0, buffer.nbytes))
        return self._peers.receive(buffer, source)

    def finish(self, request: Any) -> None:
        self._peers.finish(request)


@contextmanager
def recorded(comm: Communicator, partners: bool = False) -> Iterator[list[tuple[str, int, int]]]:
    """What the implementation is handed meanwhile: (call, bytes to send, bytes to fill); `partners` as in `Watched`."""
    calls: list[tuple[str, int, int]] = []
    peers = comm.peers

    def watch(name: str, sizes: Callable[..., tuple[int, int]]) -> None:
        act = getattr(comm, name)

        def call(*arguments: Any) -> None:
            calls.append((name, *sizes(*arguments)))
            act(*arguments)

        setattr(comm, name, call)

    def size(buffer: Buffer | None) -> int:
        return 0 if buffer is None else buffer.nbytes

    root = comm.rank == 0
    watch("_broadcast", lambda buffer: (size(buffer), 0) if root else (0, size(buffer)))
    for name in ("_gather", "_scatter", "_reduce", "_allreduce"):
        watch(name, lambda send, receive, *counts: (size(send), size(receive)))
    comm.peers = Watched(peers, calls, partners)
    try:
        yield calls
    finally:
        comm.peers = peers
        for name in ("_broadcast", "_gather", "_scatter", "_reduce", "_allreduce"):
            delattr(comm, name)


def traffic_is_what_mpi_is_handed(comm: Communicator) -> None:
    counts = uneven(comm.size)
    mine, total = counts[comm.rank], sum(counts)
    for nbytes in (comm.chunk_bytes, 16):
        comm.traffic.take()
        with chunks(comm, nbytes), recorded(comm) as calls:
            comm.broadcast(data(0, 100), {"a": 60, "b": 40})
            comm.gather(data(comm.rank, mine), counts, {"a": mine}, {"a": total})
            comm.scatter(data(0, total) if comm.rank == 0 else None, counts, {"a": mine}, {"a": total})
            comm.reduce(np.zeros(10), {"a": 80})
            comm.sum_everywhere(np.zeros(3), "b")
            comm.agree("no")
            comm.gather_bytes(b"12345", "b")
        sent, received = comm.traffic.take()
        assert sum(sent.values()) == sum(call[1] for call in calls)
        assert sum(received.values()) == sum(call[2] for call in calls)


def traffic_by_label(comm: Communicator) -> None:
    """By hand. `broadcast_bytes` is 8 bytes of length and the bytes; `gather_bytes` first sums a float64 a rank, and
    what goes with them."""
    ranks, root = comm.size, comm.rank == 0
    comm.traffic.take()
    comm.broadcast(np.zeros(5, np.float32), {"down/model": 20})
    assert comm.traffic.take() == (({"down/model": 20}, {}) if root else ({}, {"down/model": 20}))
    comm.broadcast_bytes(b"abc")
    assert comm.traffic.take() == (({CONTROL: 11}, {}) if root else ({}, {CONTROL: 11}))
    _, sums = comm.gather_bytes_and_sum(b"x" * comm.rank, [1.0, comm.rank, 0.0], "hello")
    assert list(sums) == [ranks, ranks * (ranks - 1) // 2, 0.0]
    sent, received = comm.traffic.take()
    assert sent == {"hello": 8 * (ranks + 3) + comm.rank}
    assert received == {"hello": 8 * (ranks + 3) + (ranks * (ranks - 1) // 2 if root else 0)}
    comm.reduce(np.zeros(6, np.float32), {"up/update": 24})
    assert comm.traffic.take() == ({"up/update": 24}, {"up/update": 24} if root else {})


# --- all together -----------------------------------------------------------------------------------------------------
def random_sequence(comm: Communicator) -> None:
    """60 collectives of random kind and length, cut at random, each checked; every rank draws the same."""
    draw = np.random.default_rng(11)
    for _ in range(60):
        counts = [int(count) for count in draw.integers(0, 20, comm.size)]
        whole = np.concatenate([data(rank, count) for rank, count in enumerate(counts)])
        mine = data(comm.rank, counts[comm.rank])
        with chunks(comm, int(draw.choice([8, 40, 1 << 20]))):
            match draw.integers(4):
                case 0:
                    buffer = whole.copy() if comm.rank == 0 else np.zeros_like(whole)
                    comm.broadcast(buffer, {})
                    assert np.array_equal(buffer, whole)
                case 1:
                    received = comm.gather(mine, counts, {})
                    assert received is None or np.array_equal(received, whole)
                case 2:
                    assert np.array_equal(comm.scatter(whole if comm.rank == 0 else None, counts, {}), mine)
                case _:
                    total = comm.sum_everywhere(whole[:9].astype(np.float64) * comm.rank)
                    assert np.array_equal(total, whole[:9] * (comm.size * (comm.size - 1) / 2))


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        broadcast,
        broadcast_of_several_axes,
        gather,
        scatter,
        gather_undoes_scatter,
        reduce,
        reduce_refuses_other_types,
        sum_everywhere,
        barrier,
        broadcast_bytes,
        broadcast_json,
        gather_bytes,
        agree,
        routes,
        reduce_along_routes,
        routes_send_what_is_counted,
        one_crossing_for_a_node,
        small_chunks_change_nothing,
        no_call_moves_more_than_a_chunk,
        traffic_is_what_mpi_is_handed,
        traffic_by_label,
        random_sequence,
    )
}


def run_all(modules: list[str]) -> list[str]:
    """On every rank of the world: every check in the `CHECKS` of these modules; the names of those that passed."""
    from mpifed.comm.mpi import Mpi

    comm = Mpi()
    passed = []
    for name, check in every_check(modules).items():
        try:
            check(comm)
        except BaseException as error:
            error.add_note(f"in the check '{name}', on rank {comm.rank} of {comm.size}")
            raise
        comm.barrier()
        passed.append(name)
    return passed


def every_check(modules: Iterable[str]) -> dict[str, Check]:
    """The checks of several modules by name."""
    return {name: check for module in modules for name, check in import_module(module).CHECKS.items()}
