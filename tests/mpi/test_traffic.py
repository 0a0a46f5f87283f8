"""The collectives of a round and their bytes, as docs/mpi.md states them for the default job."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from mpifed.comm.communicator import Communicator
from mpifed.comm.inprocess import run_ranks
from mpifed.job import load
from tests.algorithm_table import engine_of
from tests.mpi.checks import recorded

pytestmark = pytest.mark.mpi_skip

MODEL = 4 * (64 * 64 + 64 + 64 * 10 + 10)
"""Bytes of the default job's model in float32: 8x8 pixels, 64 hidden units, 10 classes."""
CLIENTS = 10


def default_job(
    reduction: str, ranks: int, folder: Path, *overrides: str
) -> tuple[list[list[str]], dict[str, tuple[int, int, int]]]:
    """FedAvg: by rank the collectives of three rounds in order; (logical, sent, received) bytes of round 1 by kind."""
    changes = ["algorithm.name=fedavg", "rounds=3", "checkpoint.every_rounds=0", "local.epochs=1"]
    job = load(None, [*changes, f"reduce={reduction}", *overrides])

    def main(comm: Communicator) -> tuple[list[str], dict[str, tuple[int, int, int]]]:
        engine = engine_of(job, comm, folder)
        with recorded(comm) as calls:
            engine.run()
        totals: dict[str, tuple[int, int, int]] = {}
        for entry in engine.records.ledger.entries:
            if entry.round == 1 and entry.direction != "control":
                kind = f"{entry.direction}.{entry.kind}"
                logical, sent, received = totals.get(kind, (0, 0, 0))
                totals[kind] = (logical + entry.logical, sent + entry.mpi_sent, received + entry.mpi_received)
        return [name for name, _, _ in calls], totals

    ranks_had = run_ranks(ranks, main)
    return [names for names, _ in ranks_had], ranks_had[0][1]


@pytest.mark.parametrize("reduction", ["ordered", "tree"])
def test_five_collectives_a_round(reduction: Literal["ordered", "tree"], tmp_path: Path) -> None:
    """Download: the model. Upload: announcement, then updates. End: lengths (and: stop?), then numbers."""
    upload = "_gather" if reduction == "ordered" else "_reduce"
    a_round = ["_broadcast", "_allreduce", upload, "_allreduce", "_gather"]
    by_rank, _ = default_job(reduction, 3, tmp_path)
    assert by_rank[0][: 3 * 5] == 3 * a_round
    assert by_rank == [by_rank[0]] * 3


@pytest.mark.parametrize(
    ("reduction", "ranks", "down", "up"),
    [
        ("ordered", 1, (1, 0), (CLIENTS, CLIENTS)),
        ("ordered", 2, (1, 1), (CLIENTS, CLIENTS)),
        ("ordered", 11, (1, 10), (CLIENTS, CLIENTS)),
        ("tree", 2, (1, 1), (2, 1)),
        ("tree", 11, (1, 10), (11, 1)),
    ],
)
def test_bytes_of_a_round(
    reduction: str, ranks: int, down: tuple[int, int], up: tuple[int, int], tmp_path: Path
) -> None:
    """`down` and `up`: (sent, received) in models. Logical bytes are 10 models each way on any number of ranks."""
    _, totals = default_job(reduction, ranks, tmp_path)
    assert totals == {
        "down.model": (CLIENTS * MODEL, down[0] * MODEL, down[1] * MODEL),
        "up.update": (CLIENTS * MODEL, up[0] * MODEL, up[1] * MODEL),
        "up.weight": (CLIENTS * 8, 0, 0),  # travels in the announcement, which is mpifed's own message
    }


@pytest.mark.parametrize(
    ("reduction", "ranks", "itemsize", "sent", "received"),
    [("ordered", 3, 8, 2, 2), ("ordered", 5, 8, 4, 4), ("ordered", 6, 8, 6, 1), ("tree", 3, 4, 3, 1)],
)
def test_a_long_model_is_added_before_it_is_sent(
    reduction: str, ranks: int, itemsize: int, sent: int, received: int, tmp_path: Path
) -> None:
    """300 hidden units: 64 * 300 + 300 + 300 * 10 + 10 = 22,510 parameters. `sent` and `received` in vectors: from up
    to four ranks that train they are gathered, from more (and in a tree) reduced, with rank 0's."""
    _, totals = default_job(reduction, ranks, tmp_path, "model.hidden=[300]")
    vector = 22_510 * itemsize
    assert totals["up.update"] == (CLIENTS * 22_510 * 4, sent * vector, received * vector)
