"""A rank that waits leaves its core to the others, whatever the MPI library does when it waits."""

from __future__ import annotations

import pytest

from benchmarks.idle import shares

pytestmark = pytest.mark.mpi_skip


@pytest.mark.parametrize("wait", ["clients for the server", "server for the clients"])
def test_a_waiting_rank_uses_little_of_a_core(wait: str) -> None:
    """3 s here, where start and end weigh more: 15 %. A rank that polls without sleeping uses all that it can get.

    `benchmarks/idle.py` measures 20 s and asks for 5 %.
    """
    waiting, computing = shares(wait, ranks=3, seconds=3.0)  # type: ignore[arg-type]
    assert waiting < 0.15
    assert waiting < computing
