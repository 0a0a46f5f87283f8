"""The plan that `--dry-run` prints: the bytes are those of the run, and who is where is where they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mpifed.comm.communicator import Communicator
from mpifed.comm.inprocess import InProcess, run_ranks
from mpifed.federation.federation import Federation
from mpifed.federation.plan import describe, planned_bytes, spans
from mpifed.job import Job
from tests.algorithm_table import CLIENTS, job_of, run


def plan(job: Job, ranks: int = 1) -> str:
    def main(comm: Communicator) -> str:
        return describe(Federation.build(job, comm))

    return run_ranks(ranks, main)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"participation": 1.0},
        {"participation": 0.4, "sampling": "bernoulli", "rounds": 6},
        {"sampling": "examples", "codec": "half"},
        {"codec": {"up.update": "half"}, "reduce": "tree"},
    ],
    ids=["count", "all", "bernoulli", "half", "half-update"],
)
def test_planned_bytes_are_those_of_the_run(changes: dict[str, Any], tmp_path: Path) -> None:
    job = job_of({"name": "fedavg"}, **changes)
    totals, unknown = planned_bytes(Federation.build(job, InProcess.alone()))
    counted: dict[str, int] = {}
    for (_, kind), size in run(job, tmp_path, 3).logical().items():
        counted[kind] = counted.get(kind, 0) + size
    assert totals == counted and unknown == {}


def test_planned_bytes_of_phases(tmp_path: Path) -> None:
    """Phases that repeat, ask everybody, and scatter; a length that only the clients know stays open."""
    job = job_of({"name": "tests.unit.test_engine:TwoPhases"})
    totals, unknown = planned_bytes(Federation.build(job, InProcess.alone()))
    counted: dict[str, int] = {}
    for (_, kind), size in run(job, tmp_path, 2).logical().items():
        counted[kind] = counted.get(kind, 0) + size
    assert unknown == {"up.list": (0, None)}
    del counted["up.list"]
    assert totals == counted


def test_the_text() -> None:
    """30 parameters and 6 statistics, float32, 3 clients, 3 rounds: 9 * 120 and 9 * 24 each way, 9 * 8 of weights."""
    lines = [" ".join(line.split()) for line in plan(job_of({"name": "fedavg"})).splitlines()]
    start = lines.index("# logical bytes of the run")
    assert lines[start + 1 :] == [
        "down.buffers 216",
        "down.model 1,080",
        "up.buffers_update 216",
        "up.update 1,080",
        "up.weight 72",
        "all down 1,296",
        "all up 1,368",
    ]
    assert "up.list depends on the values" in " ".join(
        plan(job_of({"name": "tests.unit.test_engine:TwoPhases"})).split()
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_hosting_is_the_roster(ranks: int) -> None:
    """Every client once, with its samples; rank 0 is the server, and trains only when it is alone."""
    job = job_of({"name": "scaffold"})
    federation = Federation.build(job, InProcess.alone())
    lines = [line for line in plan(job, ranks).splitlines() if line.startswith("rank ")]
    assert len(lines) == ranks
    assert ("server and clients" in lines[0]) == (ranks == 1)
    samples = [int(number.replace(",", "")) for number in re.findall(r"\(([\d,]+) samples\)", "\n".join(lines))]
    assert sum(samples) == sum(federation.roster.examples) == 120
    if ranks == 7:
        assert [line.endswith("-") for line in lines] == [True] + [False] * CLIENTS + [True]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((4,), "4"), ((0, 1, 2, 3, 7), "0-3, 7"), ((1, 3, 5, 6), "1, 3, 5-6"), ((8, 9), "8-9")],
)
def test_spans(numbers: tuple[int, ...], text: str) -> None:
    assert spans(numbers) == text
