"""Ranks that are threads, and what a communicator counts; every collective is checked in `tests/mpi/checks.py`."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mpifed.comm.communicator import CONTROL, Communicator
from mpifed.comm.inprocess import InProcess, run_ranks


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_ranks(4, lambda comm: (comm.rank, comm.size)) == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_one_rank_is_a_world() -> None:
    comm = InProcess.alone()
    assert (comm.rank, comm.size) == (0, 1)
    assert comm.gather_bytes(b"x") == [b"x"]
    assert comm.broadcast_bytes(b"y") == b"y"
    assert comm.agree(None) is None and comm.agree("no space") == "no space"
    assert comm.sum_everywhere(np.array([1.5])).tolist() == [1.5]
    comm.barrier()


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failing_rank_ends_those_that_wait_for_it(failing: int) -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == failing:
            raise RuntimeError(f"rank {comm.rank} is gone")
        comm.barrier()

    before = threading.active_count()
    with pytest.raises(RuntimeError, match=f"rank {failing} is gone"):
        run_ranks(3, main)
    assert threading.active_count() == before


def test_an_unannounced_length_is_an_error_not_a_wrong_result() -> None:
    def main(comm: Communicator) -> None:
        comm.gather(np.zeros(2 + comm.rank, np.uint8), [2, 2], {})

    with pytest.raises(AssertionError, match="unannounced length"):
        run_ranks(2, main)


def test_traffic_by_label() -> None:
    """Three ranks: 8 bytes broadcast of two kinds, 1 + 2 + 3 gathered, 3 + 2 + 1 dealt, 4 float32 added, 2 float64."""

    def main(comm: Communicator) -> tuple[dict[str, int], dict[str, int]]:
        rank, root = comm.rank, comm.rank == 0
        comm.broadcast(np.zeros(8, np.uint8), {"a": 5, "b": 3})
        comm.gather(np.zeros(1 + rank, np.uint8), [1, 2, 3], {"up": 1 + rank}, {"up": 6})
        comm.scatter(np.zeros(6, np.uint8) if root else None, [3, 2, 1], {"own": 3 - rank}, {"own": 6})
        comm.reduce(np.zeros(4, np.float32), {"sum": 16})
        comm.sum_everywhere(np.zeros(2))
        taken = comm.traffic.take()
        assert comm.traffic.take() == ({}, {})
        return taken

    assert run_ranks(3, main) == [
        ({"a": 5, "b": 3, "up": 1, "own": 6, "sum": 16, CONTROL: 16}, {"up": 6, "own": 3, "sum": 16, CONTROL: 16}),
        ({"up": 2, "sum": 16, CONTROL: 16}, {"a": 5, "b": 3, "own": 2, CONTROL: 16}),
        ({"up": 3, "sum": 16, CONTROL: 16}, {"a": 5, "b": 3, "own": 1, CONTROL: 16}),
    ]


def test_small_messages_are_counted_with_their_lengths() -> None:
    """`broadcast_bytes` sends an int64 and the bytes; `gather_bytes` adds up one float64 a rank, then gathers."""

    def main(comm: Communicator) -> list[tuple[dict[str, int], dict[str, int]]]:
        comm.broadcast_bytes(b"12345" if comm.rank == 0 else None, "job")
        first = comm.traffic.take()
        comm.gather_bytes(b"1" * (3 + comm.rank), "host")
        return [first, comm.traffic.take()]

    assert run_ranks(2, main) == [
        [({"job": 13}, {}), ({"host": 16 + 3}, {"host": 16 + 7})],
        [({}, {"job": 13}), ({"host": 16 + 4}, {"host": 16})],
    ]
