"""What `mpifed predict` says before a run, against the run: bytes to the byte, seconds by hand-derived numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpifed.errors import BadInput
from mpifed.federation.federation import Federation
from mpifed.job import Job
from mpifed.predict.bytes import Planner, amounts
from mpifed.predict.command import hosts
from mpifed.predict.prediction import predict
from mpifed.predict.units import bandwidth, seconds
from tests.algorithm_table import ROWS, Row, job_of, run

Predicted = dict[tuple[int, str, str, str, int], tuple[int, int, int]]
"""(logical, sent, filled) by round, phase, direction, kind and rank."""


def predicted(job: Job, ranks: int, most: bool = False, hosts: Sequence[str] | None = None) -> Predicted:
    planner = Planner(Federation.planned(job, hosts or ["here"] * ranks))
    found: Predicted = {}
    for exchange in planner.exchanges():
        for (phase, direction, kind), columns in amounts(exchange, planner.usual_clients(), most).items():
            for rank in range(ranks):
                key = exchange.step.round, phase, direction, kind, rank
                before = found.get(key, (0, 0, 0))
                found[key] = tuple(a + int(b[rank]) for a, b in zip(before, columns, strict=True))  # type: ignore[assignment]
    for round_ in range(1, job.rounds + 1):
        for call in planner.report(0):
            for rank in range(ranks):
                key = round_, "", "control", "control", rank
                logical, sent, filled = found.get(key, (0, 0, 0))
                more = [sum(int(part[rank]) for part in way.values()) for way in (call.sent, call.received)]
                found[key] = logical, sent + more[0], filled + more[1]
    return {key: columns for key, columns in found.items() if any(columns)}


def counted(job: Job, folder: Path, ranks: int, hosts: Sequence[str] | None = None) -> Predicted:
    return {tuple(entry[:5]): tuple(entry[5:]) for entry in run(job, folder, ranks, hosts=hosts).ledger}  # type: ignore[misc]


def same_bytes(told: Predicted, found: Predicted, rounds: int, ranks: int) -> None:
    """All entries alike but for the reports, which rank 0 fills with exactly what all ranks send of them."""
    exchanged, real = ({key: entry for key, entry in of.items() if key[2] != "control"} for of in (told, found))
    assert exchanged == real
    for round_ in range(1, rounds + 1):
        gaps = []
        for rank in range(ranks):
            key = round_, "", "control", "control", rank
            gaps.append([real - plan for real, plan in zip(found[key], told[key], strict=True)])
        assert gaps[0][2] == sum(gap[1] for gap in gaps) > 0
        assert [gap[2] for gap in gaps[1:]] == [0] * (ranks - 1)
        assert all(0 < gap[1] < 4096 for gap in gaps)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_bytes_are_those_of_the_ledger(row: Row, tmp_path: Path) -> None:
    """By round, phase, direction, kind and rank; in FAug's first round up to the lengths that clients choose."""
    job, ranks = job_of(row), 3
    told, found = predicted(job, ranks), counted(job, tmp_path, ranks)
    if row.id.startswith("faug"):
        chosen = [key for key in found if key[3] in ("seeds", "seed_labels") and key[2] == "up"]
        assert chosen and all(key not in told for key in chosen)
        found = {key: entry for key, entry in found.items() if key not in chosen}
    same_bytes(told, found, job.rounds, ranks)


LONG = {"model": {"name": "mlp", "hidden": [3000]}}
"""A model of more than 16,384 elements, which is added exactly."""


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        (LONG, 1),
        (LONG, 3),
        (LONG | {"clients": 7, "participation": 1.0}, 7),
        (LONG | {"reduce": "tree"}, 4),
        (LONG | {"codec": "half"}, 3),
        ({"codec": {"up.update": "half"}, "sampling": "bernoulli", "participation": 0.5, "rounds": 5}, 3),
        ({"codec": {"up.update": "topk(fraction=0.1)", "down.model": "quantize"}}, 3),
        ({"codec": {"up.update": "powersgd"}}, 2),
        ({"algorithm": {"name": "tests.unit.test_engine:TwoPhases"}}, 3),
    ],
    ids=["long", "long-3", "long-7", "tree", "half", "bernoulli", "topk", "powersgd", "phases"],
)
def test_bytes_of_other_exchanges(changes: Mapping[str, Any], ranks: int, tmp_path: Path) -> None:
    """Exact sums gathered and reduced, MPI's own, encoded fields, phases that repeat, scatter and ask everybody."""
    job = job_of({"name": "fedavg"}, **changes)
    told, found = predicted(job, ranks), counted(job, tmp_path, ranks)
    same_bytes(told, {key: entry for key, entry in found.items() if key[3] != "list"}, job.rounds, ranks)


@pytest.mark.parametrize("route", ["flat", "tree", "hierarchical"])
@pytest.mark.parametrize(
    "changes",
    [
        LONG | {"algorithm": {"name": "scaffold"}, "participation": 2},
        LONG | {"algorithm": {"name": "scaffold"}, "participation": 2, "reduce": "tree"},
        {"algorithm": {"name": "tests.unit.test_engine:TwoPhases"}, "clients": 3, "participation": 1.0},
    ],
    ids=["exact", "by-mpi", "parts"],
)
def test_bytes_along_routes(changes: Mapping[str, Any], route: str, tmp_path: Path) -> None:
    """On three nodes: sums of two of the four ranks that train, one of them by a route of its own; gathered and dealt
    out parts."""
    table = {"down": route, "up": route} | ({"up.update": "flat"} if "reduce" in changes else {})
    job, places = job_of({"name": "fedavg"}, **changes, rounds=2, collectives=table), ["a", "b", "a", "b", "c"]
    told, found = predicted(job, 5, hosts=places), counted(job, tmp_path, 5, places)
    same_bytes(told, {key: entry for key, entry in found.items() if key[3] != "list"}, job.rounds, 5)


def test_a_codec_that_looks_at_the_values_is_between_its_bounds(tmp_path: Path) -> None:
    """FedKD with SVD both ways: each entry, of a field with matrices, lies between the least and the most."""
    row = next(row for row in ROWS if row.id == "fedkd")
    job = job_of(row, codec={"up.update": "svd", "down.update": "svd"}, model={"name": "mlp", "hidden": [20]})
    least, most = (predicted(job, 3, which) for which in (False, True))
    for key, entry in counted(job, tmp_path, 3).items():
        if key[2] != "control":
            assert all(low <= real <= high for low, real, high in zip(least[key], entry, most[key], strict=True)), key
    assert least != most


# --- what is printed --------------------------------------------------------------------------------------------------
def test_the_bytes_of_the_text() -> None:
    """30 parameters and 6 statistics, float32; 3 clients, 3 rounds, 3 ranks, of which two train 2 and 1, or 1 and 2.

    Down: 120 bytes a client and round; sent once, filled on two ranks. Up: too short to be added exactly, so that all
    replies are gathered. Control: the announcement, of 3 clients with 6 numbers, and 5 of the round's end; on 3 ranks.
    """
    job = job_of({"name": "fedavg"})
    text = predict(Federation.planned(job, hosts(3, 2))).text()
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line and line[0].islower()}
    assert rows["down.model"] == ["1,080", "360", "720"]
    assert rows["up.update"] == ["1,080"] * 3
    assert rows["up.weight"] == ["72", "0", "0"]
    assert rows["control"] == ["0", *[f"{3 * 3 * 8 * (3 * 6 + 5):,}"] * 2]
    assert "3 ranks on 2 nodes" in text


def test_codecs_that_look_at_the_values_are_shown_between_bounds() -> None:
    """A model of 4 x 20 and 20 x 3 in SVD: of all zero matrices two tags and 23 biases are left; else all 163."""
    job = job_of({"name": "fedavg"}, codec={"up.update": "svd"}, model={"name": "mlp", "hidden": [20]})
    prediction = predict(Federation.planned(job, hosts(2, 1)))
    least, most = 9 * (2 * 4 + 23 * 4), 9 * (2 * 4 + 163 * 4)
    assert prediction.in_all.least["up", "update"] == (least, least, least)
    assert prediction.in_all.most["up", "update"] == (most, most, most)
    assert f"{least} B to {most / 1000:.2f} kB" in prediction.text()


@pytest.mark.parametrize(
    ("text", "expected"), [("100Mbit", 12.5e6), ("10Gbit/s", 1.25e9), ("25Gbps", 3.125e9), ("1.2 GB/s", 1.2e9)]
)
def test_bandwidths(text: str, expected: float) -> None:
    assert bandwidth(text) == pytest.approx(expected)


@pytest.mark.parametrize(("text", "expected"), [("0.5ms", 5e-4), ("20us", 2e-5), ("1 s", 1.0), ("0s", 0.0)])
def test_times(text: str, expected: float) -> None:
    assert seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "100", "0Mbit", "-1Mbit", "10 parsecs", "10Mbyte"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(BadInput, match="--bandwidth"):
        bandwidth(text)


@pytest.mark.parametrize("text", ["", "5", "-1ms", "5 min"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(BadInput, match="--latency"):
        seconds(text)


def test_ranks_are_dealt_to_nodes_in_blocks() -> None:
    assert hosts(5, 2) == ["node1", "node1", "node1", "node2", "node2"]
    with pytest.raises(BadInput, match="--nodes: 3 nodes for 2 ranks"):
        hosts(2, 3)
