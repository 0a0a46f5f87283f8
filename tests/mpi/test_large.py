"""Payloads beyond what one MPI call can count: more than 2^31 bytes with `--sweep`, otherwise cut just as often."""

from __future__ import annotations

import numpy as np
import pytest

from tests.launch import run_ranks

pytestmark = [pytest.mark.mpi_skip, pytest.mark.slow, pytest.mark.timeout(900)]

LARGE = 2_200_000_000  # above 2^31 - 1, the largest count; two ranks hold 6.6 GB between them in the reduction
SMALL = 2_200_000


def move(nbytes: int, chunk_bytes: int) -> dict[str, list[int]]:
    """Broadcast, gather and reduce `nbytes`, checked to the last byte; MPI bytes by label, `[sent, received]`."""
    from mpifed.comm.mpi import Mpi

    comm = Mpi()
    comm.chunk_bytes = chunk_bytes
    assert comm.size == 2
    buffer = _ramp(nbytes) if comm.rank == 0 else np.zeros(nbytes, np.uint8)
    comm.broadcast(buffer, {"broadcast": nbytes})
    assert _is_ramp(buffer)

    counts = [1000, nbytes]  # all but a little from rank 1
    buffer = buffer[: counts[comm.rank]]
    received = comm.gather(buffer, counts, {"gather": counts[comm.rank]}, {"gather": sum(counts)})
    del buffer
    if received is not None:
        assert _is_ramp(received[:1000]) and _is_ramp(received[1000:])
    del received

    values = np.full(nbytes // 4, comm.rank + 1.0, np.float32)
    values[-1] = 10.0 * comm.rank
    total = comm.reduce(values, {"reduce": values.nbytes})
    if total is not None:
        assert total[-1] == 10.0 and total[:-1].min() == total[:-1].max() == 3.0

    sent, filled = comm.traffic.take()
    return {label: [sent.get(label, 0), filled.get(label, 0)] for label in ("broadcast", "gather", "reduce")}


def _ramp(size: int) -> np.ndarray:
    """0, 1, ..., 250, 0, 1, ...: pieces are no multiple of 251, so that one that comes to a wrong place is seen."""
    return np.resize(np.arange(251, dtype=np.uint8), size)


def _is_ramp(buffer: np.ndarray) -> bool:
    """Compared a part at a time: a copy for the comparison would double the memory."""
    length = 251 << 14
    expected = _ramp(min(length, buffer.size))
    parts = (buffer[start : start + length] for start in range(0, buffer.size, length))
    return all(np.array_equal(part, expected[: part.size]) for part in parts)


def test_more_bytes_than_one_call_can_move(sweep: bool) -> None:
    nbytes, chunk_bytes = (LARGE, 1 << 30) if sweep else (SMALL, (1 << 30) // (LARGE // SMALL))
    arguments = {"nbytes": nbytes, "chunk_bytes": chunk_bytes}
    server, client = run_ranks("tests.mpi.test_large:move", 2, timeout=600, arguments=arguments)
    assert server == {"broadcast": [nbytes, 0], "gather": [1000, nbytes + 1000], "reduce": [nbytes, nbytes]}
    assert client == {"broadcast": [0, nbytes], "gather": [nbytes, 0], "reduce": [nbytes, 0]}
