"""The cost formulas of `mpifed predict` by hand-derived numbers, a trial of every algorithm, and the probe's file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpifed.comm.collection import SLICE_BYTES
from mpifed.comm.inprocess import InProcess, run_ranks
from mpifed.errors import BadInput
from mpifed.federation.federation import Federation
from mpifed.predict.bytes import Call, Planner
from mpifed.predict.command import compute_of, hosts, network_of, work_key
from mpifed.predict.compute import ClientCost, Compute, Line, Work, of_clients, of_two, work_of
from mpifed.predict.cost import Curve, Link, Measured, Places, Textbook, collective, fit
from mpifed.predict.measured import Probe
from mpifed.predict.prediction import predict
from mpifed.predict.probe import probe
from mpifed.predict.timeline import Cores, Timeline, sharing
from mpifed.predict.trial import choose, try_out
from tests.algorithm_table import ROWS, Row, job_of

LINK = Link(1e-3, 1e-6)
"""1 ms a message, 1 us a byte."""


# --- collectives ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("operation", "ranks", "size", "expected"),
    [
        ("broadcast", 1, 1000, 0.0),
        ("broadcast", 4, 1000, 2 * (1e-3 + 1e-3)),  # two levels of a tree
        ("broadcast", 5, 20_000, 3 * (1e-3 + 20e-3)),  # long, but few ranks
        ("broadcast", 8, 20_000, (3 + 7) * 1e-3 + 2 * 7 / 8 * 20e-3),  # scattered and gathered
        ("gather", 5, 20_000, 4 * 1e-3 + 20e-3),
        ("scatter", 5, 20_000, 4 * 1e-3 + 20e-3),
        ("reduce", 4, 1000, 2 * (1e-3 + 1000 * (1e-6 + 1e-7))),
        ("reduce", 4, 40_000, 4 * 1e-3 + 2 * 3 / 4 * 40e-3 + 3 / 4 * 4e-3),
        ("sum", 3, 16, 2 * (1e-3 + 16 * 1.1e-6)),
    ],
)
def test_textbook_costs(operation: Any, ranks: int, size: int, expected: float) -> None:
    """After Thakur et al. 2005; a byte is added in 0.1 us."""
    assert collective(operation, ranks, size, LINK, add=1e-7) == pytest.approx(expected)


def call_of(operation: Any, of_ranks: list[int], pieces: int = 1) -> Call:
    sent = {"kind": np.array(of_ranks)}
    return Call(operation, sent, sent, pieces)


def test_costs_of_ranks_on_nodes() -> None:
    """Two nodes of two: the network joins two, memory two. Of a gather, 2 messages of 300 bytes in all cross, 100 stay.

    Broadcast of 1000: 1 ms + 1 ms across, and in memory 10 us + 100 us.
    """
    textbook, places = Textbook(LINK, Link(1e-5, 1e-7)), Places(hosts(4, 2))
    assert textbook.seconds(call_of("broadcast", [0, 1000, 1000, 1000]), places) == pytest.approx(2e-3 + 1.1e-4)
    gathered = textbook.seconds(call_of("gather", [50, 100, 100, 200]), places)
    assert gathered == pytest.approx(2 * 1e-3 + 300e-6 + 1e-5 + 100e-7)
    assert textbook.seconds(call_of("broadcast", [0] + [1000] * 3, pieces=2), places) == pytest.approx(
        2 * (1e-3 + 0.5e-3 + 1e-5 + 0.5e-4)
    )


def test_a_fit_finds_a_line_and_is_never_below_zero() -> None:
    line = fit([0, 10, 20], [1.0, 2.0, 3.0])
    assert (line.latency, line.per_byte) == (pytest.approx(1.0), pytest.approx(0.1))
    burst = fit([10, 20], [0.5, 2.0])  # would be -1 + 0.15 n; through the origin (5 + 40) / 500
    assert (burst.latency, burst.per_byte) == (0.0, pytest.approx(45 / 500))
    falling = fit([0, 10], [3.0, 1.0])
    assert (falling.latency, falling.per_byte) == (pytest.approx(2.0), 0.0)


def test_a_curve_is_what_was_measured_and_goes_on_with_its_last_slope() -> None:
    curve = Curve([100.0, 200.0, 400.0], [1.0, 1.0, 3.0])
    assert [curve.at(size) for size in (0, 100, 150, 300, 400, 500)] == pytest.approx([1, 1, 1, 2, 3, 4])


def test_measured_collectives_are_stretched_to_other_ranks() -> None:
    """Broadcast on two nodes took 1 s + 0.01 s a byte; on four, a tree of two levels takes twice both.

    A gather's bytes are those of all others already; of three messages in place of one its latency is three times as
    long.
    """
    curve = Curve([0.0, 100.0], [1.0, 2.0])
    measured = Measured({"broadcast": curve, "gather": curve}, Places(hosts(2, 2)))
    two, four = Places(hosts(2, 2)), Places(hosts(4, 4))
    assert measured.seconds(call_of("broadcast", [0, 50]), two) == pytest.approx(1.5)
    assert measured.seconds(call_of("broadcast", [0, 50, 50, 50]), four) == pytest.approx(3.0)
    assert measured.seconds(call_of("gather", [0, 20, 20, 10]), four) == pytest.approx(3 * 1.0 + 0.5)
    assert measured.seconds(call_of("gather", [50]), Places(hosts(1, 1))) == 0.0


# --- work -------------------------------------------------------------------------------------------------------------
def test_clients_costs_are_found_again() -> None:
    """Three sizes that tell base, steps and samples apart; and one size, which tells samples alone."""
    cost = ClientCost(0.5, 0.01, 0.001)
    works = [Work(3, 90), Work(10, 300), Work(11, 321), Work(40, 1279)]
    found = of_clients([(work, cost.at(work)) for work in works])
    assert (found.base, found.step, found.sample) == pytest.approx((0.5, 0.01, 0.001), rel=1e-6)
    alike = of_clients([(Work(4, 100), 1.0), (Work(4, 100), 3.0)])
    assert alike.at(Work(8, 200)) == pytest.approx(4.0)
    assert of_clients([(Work(0, 0), 2.0)]).at(Work(5, 5)) == pytest.approx(2.0)


def test_no_part_of_a_cost_is_below_zero() -> None:
    """The larger client took less, as noise has it: then all take alike."""
    found = of_clients([(Work(1, 32), 2.0), (Work(10, 320), 1.0)])
    assert min(found.base, found.step, found.sample) >= 0
    assert 1.0 <= found.at(Work(100, 3200)) <= 2.0


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], Line(0, 0)),
        ([(2, 6.0)], Line(0, 3.0)),
        ([(1, 2.0), (3, 4.0)], Line(1.0, 1.0)),
        ([(1, 4.0), (3, 2.0)], Line(2.0, 0.0)),
        ([(1, 1.0), (3, 9.0)], Line(0.0, 3.0)),
    ],
)
def test_lines(points: list[tuple[float, float]], expected: Line) -> None:
    found = of_two(points)
    assert (found.base, found.slope) == pytest.approx((expected.base, expected.slope))


def test_work_is_steps_and_samples() -> None:
    """50 samples in batches of 32: two steps an epoch."""
    assert work_of(job_of({"name": "fedavg"}, local={"epochs": 3, "batch_size": 32}).local, 50) == (6, 150)
    assert work_of(job_of({"name": "fedavg"}, local={"steps": 7, "batch_size": 32}).local, 20) == (7, 140)


@pytest.mark.parametrize(
    ("loads", "cores", "contention", "expected"),
    [
        ([2.0], 2, 1.0, 2.0),
        ([1.0, 1.0, 1.0], 2, 1.0, 1.5),
        ([1.0, 3.0], 2, 1.0, 3.0),
        ([1.0, 3.0], 1, 1.0, 4.0),
        ([1.0, 3.0], 2, 1.5, 1.0 * 1.5 + 2.0),  # the second second and the third alone, undisturbed
        ([1.0, 1.0, 3.0], 2, 1.0, 1.5 + 2.0),
    ],
)
def test_processes_that_share_cores(loads: list[float], cores: int, contention: float, expected: float) -> None:
    assert sharing(loads, Cores(["here"] * len(loads), cores, contention)) == pytest.approx(expected)


# --- a round ----------------------------------------------------------------------------------------------------------
@dataclass
class Second:
    """A network in which a collective takes a second."""

    calls: list[str] = field(default_factory=list)

    def seconds(self, call: Call, places: Places) -> float:
        self.calls.append(call.operation)
        return float(call.pieces)


COMPUTE = Compute(
    client={"train": [ClientCost(1.0, 0.0, 0.5)]},
    first={"train": [ClientCost(2.0, 0.0, 0.5)]},
    server={"train": Line(3.0, 1.0)},
    communicate=Line(0.0, 0.0),
    server_test=1000.0,
    client_test=0.0,
    other=0.25,
    checkpoint=7.0,
    server_state=0,
    client_state=0,
    workspace=0,
    sizes={},
)


def test_a_round_by_hand() -> None:
    """FedAvg, 5 clients, all of them, on three ranks of three nodes of one core; two epochs.

    Collectives: download, announcement, upload; sum and gather of the report: 5 s. Training: the slowest rank's clients
    at 1 s (2 s in round 1) and 0.5 s for each of 2 n samples. Server: 3 + 5. Rank 0 tests round 1's model in round 2,
    which takes longer than all training. Waiting ranks look again after 2.5 ms, for training and for the server.
    """
    job = job_of({"name": "fedavg"}, participation=1.0, rounds=2, checkpoint={"every_rounds": 0})
    federation = Federation.planned(job, hosts(3, 3))
    network = Second()
    rounds = dict(Timeline(Planner(federation), COMPUTE, network, Cores(hosts(3, 3), 1)).rounds())
    examples = federation.roster.examples
    dealt = federation.roster.deal(range(5)).by_rank
    slowest = max(sum(2.0 + examples[client] for client in mine) for mine in dealt)
    assert rounds[1].communicate == 5.0
    assert rounds[1].train == pytest.approx(slowest)
    assert rounds[1].server == pytest.approx(8.0)
    assert rounds[1].total == pytest.approx(5 + slowest + 8 + 0.25 + 2 * 0.0025)
    assert rounds[2].train == pytest.approx(1000.0)
    assert (rounds[1].checkpoint, rounds[2].checkpoint) == (0.0, 7.0)
    assert network.calls == ["broadcast", "sum", "gather", "sum", "gather"] * 2


def test_ranks_of_a_node_with_one_core_train_in_turns() -> None:
    """Two ranks of clients on one core take what all clients take together; on two, what the slower takes."""
    job = job_of({"name": "fedavg"}, participation=1.0, rounds=1)
    federation = Federation.planned(job, hosts(3, 1))
    loads = [
        sum(2.0 + federation.roster.examples[c] for c in mine) for mine in federation.roster.deal(range(5)).by_rank
    ]
    for count, expected in ((1, sum(loads)), (2, max(loads))):
        timeline = Timeline(Planner(federation), COMPUTE, Second(), Cores(hosts(3, 1), count))
        assert next(iter(timeline.rounds()))[1].train == pytest.approx(expected)


def test_long_runs_are_followed_in_some_rounds() -> None:
    """Of 1,000 equal rounds the seconds are a thousand times those of one."""
    job = job_of({"name": "fedavg"}, participation=1.0, rounds=1000, evaluate={"every_rounds": 0})
    federation = Federation.planned(job, hosts(3, 1))
    compute = replace(COMPUTE, first=COMPUTE.client)
    found = predict(federation, compute, Second(), Cores(hosts(3, 1), 2))
    assert found.seconds is not None
    assert found.seconds.total == pytest.approx(1000 * found.later_rounds)
    assert found.first_round == pytest.approx(found.later_rounds)
    assert found.node_hours == pytest.approx((found.seconds.total + found.seconds.checkpoint) / 3600)


def test_memory_by_hand() -> None:
    """FedAvg, 3 of 5 clients on three ranks: 30 parameters and 6 statistics, 144 bytes down and up.

    A rank of two clients keeps both replies; rank 0 none, but the sums of 30 and 6 in float64 and as a result, a slice
    for each, and its state twice. Samples are made when they are wanted, as clients are dealt anew: labels are kept.
    """
    federation = Federation.planned(job_of({"name": "fedavg"}), hosts(3, 1))
    compute = replace(COMPUTE, workspace=1000, server_state=10)
    found = predict(federation, compute, Second(), Cores(hosts(3, 1), 2), process=5000).memory
    common = {"process": 5000, "models and batches": 1000, "samples": 8 * 120, "who holds what": 8 * 120 + 200 * 5}
    common |= {"client states": 0, "download": 2 * 144}
    summed = 12 * 36 + 2 * SLICE_BYTES
    assert found.root == common | {"replies until collected": 0, "server state": 20, "collected replies": summed}
    assert found.rank == common | {"replies until collected": 2 * 144}


def test_single_replies_are_all_at_rank_0() -> None:
    """FedFTG wants every model: 3 of 120 bytes; the statistics are added."""
    federation = Federation.planned(job_of(next(row for row in ROWS if row.id == "fedftg")), hosts(3, 1))
    held = predict(federation, COMPUTE, Second(), Cores(hosts(3, 1), 2)).memory.root["collected replies"]
    assert held >= 3 * 120 and held < 3 * 120 + 3 * 24 + 3 * 12 + 12 * 36 + 2 * SLICE_BYTES + 1


# --- trials -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_every_algorithm_can_be_tried_out(row: Row) -> None:
    """Each phase costs something, kept states are weighed, tests are timed, and the whole run can be predicted."""
    job = job_of(row)
    compute = try_out(job, 0.0)
    federation = Federation.planned(job, hosts(3, 1))
    planner = Planner(federation)
    phases = {exchange.step.phase.name for exchange in planner.exchanges()}
    assert set(compute.first) == phases
    assert all(cost.at(Work(10, 80)) > 0 for costs in compute.client.values() for cost in costs)
    assert (compute.client_state > 0) == row.stateful or row.id in ("pooled",)
    assert (compute.client_test > 0) == (row.evaluates != "server")
    assert (compute.server_test > 0) == (row.evaluates != "clients")
    assert Compute.from_json(json.loads(json.dumps(compute.to_json()))) == compute
    found = predict(federation, compute, Textbook(LINK), Cores(hosts(3, 1), 2))
    assert found.seconds is not None and math.isfinite(found.seconds.total) and found.seconds.train > 0
    json.loads(found.to_json())


def test_the_clients_of_a_trial() -> None:
    """Four of different size; of each further architecture a usual one."""
    assert choose([10, 20, 30, 40, 50, 60, 70, 80], 1) == [2, 0, 5, 7]
    assert choose([10, 10, 20, 20, 30, 30], 2) == [0, 4, 3]
    assert choose([5], 1) == [0]


# --- the probe --------------------------------------------------------------------------------------------------------
def test_a_probe_of_three_ranks_is_read_back(tmp_path: Path) -> None:
    """All collectives, of growing sizes; the work of the probe's own job is taken, another job's is tried out."""
    job = job_of({"name": "fedavg"})
    found = run_ranks(3, lambda comm: probe(comm, job, 0.0))[0]
    assert found is not None and set(found.curves) == {"broadcast", "scatter", "gather", "reduce", "sum"}
    file = tmp_path / "probe.json"
    file.write_text(found.to_json())
    read = Probe.read(file)
    assert (read.compute, read.curves, read.contention) == (found.compute, found.curves, found.contention)
    assert compute_of(job_of({"name": "fedavg"}, clients=4, participation=2), read, 0.0) == read.compute
    assert compute_of(job_of({"name": "fedprox"}), read, 0.0) != read.compute
    assert isinstance(network_of("", "", read, 1), Measured)
    with pytest.raises(BadInput, match="measured on one node"):
        network_of("", "", read, 2)
    assert "broadcast" in read.text()


def test_a_probe_of_one_rank_knows_no_network() -> None:
    found = probe(InProcess.alone(), job_of({"name": "fedavg"}), 0.0)
    assert found is not None and found.network is None


def test_work_is_alike_whoever_holds_the_data() -> None:
    one, other = job_of({"name": "fedavg"}), job_of({"name": "fedavg"}, clients=3, participation=2, rounds=9, seed=4)
    assert work_key(one.canonical()) == work_key(other.canonical())
    assert work_key(one.canonical()) != work_key(job_of({"name": "fedavg"}, local={"epochs": 1}).canonical())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "collectives": {"sum": 3}}', "NaN"])
def test_what_is_no_probe(text: str, tmp_path: Path) -> None:
    file = tmp_path / "probe.json"
    file.write_text(text)
    with pytest.raises(BadInput, match=r"--probe: .*probe\.json is no file of mpifed probe"):
        Probe.read(file)
    with pytest.raises(BadInput, match="cannot be read"):
        Probe.read(tmp_path / "nowhere")


def test_the_network_that_is_asked_for() -> None:
    assert network_of("8Mbit", "2ms", None, 4) == Textbook(Link(2e-3, 1e-6))
    assert network_of("", "", None, 2) is None
    with pytest.raises(BadInput, match="--latency: 1ms without --bandwidth"):
        network_of("", "1ms", None, 2)


@pytest.mark.parametrize(
    ("route", "expected"),
    [("flat", 2 * 2e-3 + 1.1e-4), ("tree", 2 * 2e-3), ("hierarchical", 2e-3 + 1.1e-4)],
)
def test_costs_along_routes(route: Any, expected: float) -> None:
    """1000 bytes from rank 0 to 3 others, one on its node: 2 ms across and 0.11 ms in memory each."""
    call = replace(call_of("broadcast", [0, 1000, 1000, 1000]), route=route)
    assert Textbook(LINK, Link(1e-5, 1e-7)).seconds(call, Places(hosts(4, 2))) == pytest.approx(expected)
