"""What holds for every algorithm of the table, and the identities and fixed points of each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpifed.algorithms import ALGORITHMS
from mpifed.algorithms.base import ClientContext, Phase, Uploads
from mpifed.algorithms.fedavg import FedAvg
from mpifed.algorithms.feddyn import FedDyn
from mpifed.algorithms.scaffold import Scaffold
from mpifed.comm.inprocess import InProcess
from mpifed.engine import Engine
from mpifed.errors import BadInput
from mpifed.federation.env import Context
from mpifed.federation.federation import Federation
from mpifed.federation.plan import planned_bytes
from mpifed.learning import local as learning
from mpifed.learning.local import local_training
from mpifed.rng import numpy_generator
from mpifed.types import Payload, State, leaves, map_state
from tests.algorithm_table import (
    CLIENTS,
    LOCAL,
    PARTICIPANTS,
    ROUNDS,
    ROWS,
    STEPS,
    Outcome,
    Row,
    Sizes,
    assert_same_bits,
    job_of,
    run,
)
from tests.toy import Quadratic, Simulation, close, quadratic

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)


def test_every_algorithm_is_in_the_table() -> None:
    assert {row.table["name"] for row in ROWS} == set(ALGORITHMS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row], Outcome]:
    """The outcome of a row on one rank, computed once."""
    outcomes: dict[str, Outcome] = {}

    def outcome(row: Row) -> Outcome:
        if row.id not in outcomes:
            outcomes[row.id] = run(job_of(row), tmp_path_factory.mktemp("alone"))
        return outcomes[row.id]

    return outcome


# --- for every algorithm ----------------------------------------------------------------------------------------------
@every_row
def test_every_round_is_evaluated_and_nobody_is_absent(row: Row, alone: Callable[[Row], Outcome]) -> None:
    rows = alone(row).rows
    assert [entry["round"] for entry in rows] == list(range(1, ROUNDS + 1))
    assert all(entry["accuracy"] is not None and entry["absent"] == [] for entry in rows)
    assert all(entry["replies"] == entry["clients"] for entry in rows)
    assert all(0 <= entry["accuracy"] <= 1 and entry["loss"] > 0 and entry["train_loss"] > 0 for entry in rows)
    assert ("accuracy_min" in rows[-1]) == (row.evaluates != "server" and row.id != "pooled")


@every_row
def test_it_learns(row: Row, tmp_path: Path) -> None:
    """Three clusters six standard deviations from the origin: with all clients, better than half is little to ask."""
    rows = run(job_of(row, rounds=8, participation=1.0, evaluate={"every_rounds": 0}), tmp_path).rows
    assert [entry["accuracy"] is None for entry in rows] == [True] * 7 + [False]
    assert rows[-1]["accuracy"] > 0.5 and rows[-1]["train_loss"] < rows[0]["train_loss"]


@every_row
def test_one_rank_equals_many_bit_for_bit(row: Row, alone: Callable[[Row], Outcome], tmp_path: Path) -> None:
    expected = alone(row)
    for ranks in (2, 3, 5):
        outcome = run(job_of(row), tmp_path / str(ranks), ranks)
        assert_same_bits(outcome.tensors(), expected.tensors())
        assert outcome.metrics() == expected.metrics()
        assert outcome.logical() == expected.logical()


@every_row
def test_tree_is_close(row: Row, alone: Callable[[Row], Outcome], tmp_path: Path) -> None:
    """Relative to the size of each tensor. What comes back to the clients passes through their training again."""
    expected = alone(row).tensors()
    outcome = run(job_of(row, reduce="tree"), tmp_path, 4).tensors()
    assert outcome.keys() == expected.keys()
    for name, tensor in expected.items():
        distance = (outcome[name].double() - tensor.double()).norm()
        assert distance <= (row.tree_tolerance or 2e-6) * max(tensor.double().norm(), 1.0), name


@every_row
def test_logical_bytes_are_the_closed_formula(row: Row, alone: Callable[[Row], Outcome], tmp_path: Path) -> None:
    """In every round, with ordered and tree reduction, and as the plan foretells."""
    tree = run(job_of(row, reduce="tree"), tmp_path, 3)
    sizes = Sizes()
    for outcome in (alone(row), tree):
        for round_ in range(1, ROUNDS + 1):
            counted = {kind: size for (t, kind), size in outcome.logical().items() if t == round_}
            assert counted == dict(row.bytes_per_round(sizes, round_))
    totals, open_kinds = planned_bytes(Federation.build(job_of(row), InProcess.alone()))
    planned: dict[str, int] = {}
    for (_, kind), size in alone(row).logical().items():
        planned[kind] = planned.get(kind, 0) + size
    assert {kind: size for kind, size in planned.items() if kind not in open_kinds} == totals


@every_row
def test_inputs_are_never_changed_in_place(row: Row, tmp_path: Path) -> None:
    """Downloads, client states and the server's state are as they were after whoever was given them."""

    def copied(state: State) -> State:
        return map_state(torch.clone, state)

    def watched(phase: Phase) -> Phase:
        def client(state: State, down: Payload, ctx: ClientContext) -> Any:
            before = copied(state), copied(down)
            result = phase.client(state, down, ctx)
            for given, kept in zip((state, down), before, strict=True):
                assert_same_bits(flat(given), flat(kept))
            return result

        def server(state: State, uploads: Uploads, round_: int) -> State:
            before = copied(state)
            result = phase.server(state, uploads, round_)
            assert_same_bits(flat(state), flat(before))
            return result

        return dataclasses.replace(phase, client=client, server=server)

    def prepare(engine: Engine) -> None:
        engine.phases = tuple(map(watched, engine.phases))

    outcome = run(job_of(row, min_replies=1 if row.id == "pooled" else PARTICIPANTS), tmp_path, 2, prepare=prepare)
    assert all(entry["absent"] == [] for entry in outcome.rows)


def flat(state: State) -> dict[str, Tensor]:
    return Outcome(state, {}, [], []).tensors()


@every_row
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(row: Row, ranks: int, tmp_path: Path) -> None:
    """Two rounds, a new engine, two more, against four in a row: states, metrics and the whole ledger.

    On another number of ranks too; then without the part of the ledger that is about ranks.
    """
    whole = run(job_of(row, rounds=4), tmp_path / "whole", ranks)
    run(job_of(row, rounds=2), tmp_path / "parts", ranks)
    again = run(job_of(row, rounds=4), tmp_path / "parts", ranks, resume=True)
    assert_same_bits(again.tensors(), whole.tensors())
    assert again.metrics() == whole.metrics()
    assert again.ledger == whole.ledger
    assert [entry["bytes"] for entry in again.rows] == [entry["bytes"] for entry in whole.rows]

    run(job_of(row, rounds=2), tmp_path / "moved", ranks)
    moved = run(job_of(row, rounds=4), tmp_path / "moved", {1: 4, 3: 2}[ranks], resume=True)
    assert_same_bits(moved.tensors(), whole.tensors())
    assert moved.metrics() == whole.metrics()
    assert moved.logical() == whole.logical()


@every_row
def test_clients_keep_a_state_where_the_row_says_so(row: Row, alone: Callable[[Row], Outcome]) -> None:
    algorithm = job_of(row).algorithm.make()
    assert (algorithm.stateful, algorithm.evaluates) == (row.stateful, row.evaluates)
    assert bool(alone(row).clients) == row.stateful


@every_row
def test_running_statistics_of_ones_own(row: Row, tmp_path: Path) -> None:
    """With `model.buffers = "local"` no statistics cross, every client keeps its own, and ranks make no difference."""
    table = {"name": "tests.algorithm_table:model", "buffers": "local"}
    outcomes = [run(job_of(row, model=table), tmp_path / str(ranks), ranks) for ranks in (1, 3)]
    assert_same_bits(outcomes[0].tensors(), outcomes[1].tensors())
    assert any("buffers" in kind for _, kind in outcomes[0].logical()) == row.sends_statistics
    roster = Federation.build(job_of(row), InProcess.alone()).roster
    for client in {client for round_ in range(1, ROUNDS + 1) for client in roster.sample(round_)}:
        assert any(name.endswith("buffers") for name, _ in leaves(outcomes[0].clients[client]["state"]))


def test_running_statistics_of_ones_own_and_averaged(tmp_path: Path) -> None:
    """Training mode does not look at running statistics: models are alike bit for bit, whatever becomes of those.

    With `both` the clients' are those of `local`, and are averaged at the server besides.
    """

    def outcome(buffers: str, **changes: Any) -> Outcome:
        model = {"name": "tests.algorithm_table:model", "buffers": buffers}
        job = job_of({"name": "fedavg"}, model=model, evaluate={"own": True}, **changes)
        return run(job, tmp_path / f"{buffers}{len(changes)}", 2)

    average, local, both = map(outcome, ("average", "local", "both"))
    assert torch.equal(average.server["model"], local.server["model"])
    assert torch.equal(average.server["model"], both.server["model"])
    assert_same_bits(
        flat({str(c): s for c, s in both.clients.items()}), flat({str(c): s for c, s in local.clients.items()})
    )
    assert [row["accuracy_own"] for row in both.rows] == [row["accuracy_own"] for row in local.rows]
    assert both.logical() == average.logical()
    # after round 1, from the same start, the means are the same
    one, other = (outcome(buffers, rounds=1).server["buffers"] for buffers in ("average", "both"))
    assert torch.equal(one, other)


# --- identities -------------------------------------------------------------------------------------------------------
def same_run(one: Any, other: Any, folder: Path, **changes: Any) -> tuple[Outcome, Outcome]:
    """The outcomes of two `[algorithm]` tables in one job."""
    return run(job_of(one, **changes), folder / "one"), run(job_of(other, **changes), folder / "other")


def test_fedprox_without_its_term_is_fedavg(tmp_path: Path) -> None:
    prox, average = same_run({"name": "fedprox", "mu": 0.0}, {"name": "fedavg"}, tmp_path)
    assert_same_bits(prox.tensors(), average.tensors())
    assert prox.rows[-1]["accuracy"] == average.rows[-1]["accuracy"] and prox.ledger == average.ledger


def test_fedprox_with_its_term_is_not(tmp_path: Path) -> None:
    prox, average = same_run({"name": "fedprox", "mu": 0.5}, {"name": "fedavg"}, tmp_path)
    start = run(job_of({"name": "fedavg"}, rounds=1), tmp_path / "start").server["model"]
    assert (prox.server["model"] - average.server["model"]).norm() > 1e-3 * start.norm()


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_begins_as_uniform_fedavg(option: str, tmp_path: Path) -> None:
    """All control variates are zero in round 1. In round 2 they are not."""
    scaffold: dict[str, Any] = {"name": "scaffold", "option": option}
    average = {"name": "fedavg", "weighting": "uniform"}
    first, plain = same_run(scaffold, average, tmp_path, rounds=1)
    assert torch.equal(first.server["model"], plain.server["model"])
    assert torch.equal(first.server["buffers"], plain.server["buffers"])
    second, plain = same_run(scaffold, average, tmp_path / "later", rounds=2)
    assert not torch.equal(second.server["model"], plain.server["model"])


def everyones(outcome: Outcome, name: str) -> Tensor:
    """The mean of a client state over all clients; zero for those that never took part."""
    total = torch.zeros_like(outcome.server["model"], dtype=torch.float64)
    for record in outcome.clients.values():
        total += record["state"][name]
    return total / CLIENTS


@pytest.mark.parametrize("rounds", [1, 2, 7])
@pytest.mark.parametrize("table", [row for row in ROWS if row.id.startswith("scaffold")], ids=lambda row: row.id)
def test_scaffold_server_control_is_the_mean_of_all_clients(table: Row, rounds: int, tmp_path: Path) -> None:
    """3 of 5 clients a round."""
    outcome = run(job_of(table, rounds=rounds), tmp_path, 3)
    assert len(outcome.clients) < CLIENTS or rounds > 1
    torch.testing.assert_close(outcome.server["control"].double(), everyones(outcome, "control"), rtol=1e-5, atol=1e-6)
    assert everyones(outcome, "control").norm() > 1e-3


@pytest.mark.parametrize("rounds", [1, 2, 7])
@pytest.mark.parametrize("table", [row for row in ROWS if row.id.startswith("feddyn")], ids=lambda row: row.id)
def test_feddyn_server_memory_is_the_mean_of_all_clients(table: Row, rounds: int, tmp_path: Path) -> None:
    """And so h, which is -alpha times it, is the mean of all g_k. The model is the active mean plus it."""
    outcome = run(job_of(table, rounds=rounds), tmp_path, 3)
    torch.testing.assert_close(outcome.server["memory"].double(), everyones(outcome, "memory"), rtol=1e-5, atol=1e-6)
    assert torch.equal(outcome.server["model"], outcome.server["active"] + outcome.server["memory"])


def test_scaffold_derived_is_naive(tmp_path: Path) -> None:
    """Without sending them, the server computes the same control variates, up to float32."""
    naive, derived = same_run(
        {"name": "scaffold"}, {"name": "scaffold", "payload": "derived"}, tmp_path, local=STEPS, rounds=5
    )
    for name in ("model", "control"):
        torch.testing.assert_close(derived.server[name], naive.server[name], rtol=1e-5, atol=1e-6)
    assert derived.rows[-1]["accuracy"] == naive.rows[-1]["accuracy"]


def test_feddyn_predicts_the_model_that_the_job_names(tmp_path: Path) -> None:
    server, active = same_run(
        {"name": "feddyn", "alpha": 0.1}, {"name": "feddyn", "alpha": 0.1, "predict": "active"}, tmp_path
    )
    assert_same_bits(server.tensors(), active.tensors())
    assert server.rows[-1]["loss"] != active.rows[-1]["loss"]
    state = server.server
    env: Any = Federation.build(job_of({"name": "feddyn"}), InProcess.alone()).env
    assert FedDyn().predictor(state, env)[0] is state["model"]
    assert FedDyn(predict="active").predictor(state, env)[0] is state["active"]


def test_local_is_training_alone(tmp_path: Path) -> None:
    """Every client's model is the one it gets by itself, from the common start, round after round."""
    job = job_of({"name": "local"}, participation=1.0)
    outcome = run(job, tmp_path, 2)
    federation = Federation.build(job, InProcess.alone())
    for client in range(CLIENTS):
        state = federation.env.initial()
        for round_ in range(1, ROUNDS + 1):
            samples = partial(federation.samples, client)
            ctx = Context(federation.env, client, round_, "train", samples, 1.0, job.local)
            ctx.model.load(*state)
            local_training(ctx)
            state = ctx.model.parameters.detach().clone(), ctx.model.buffers.clone()
        kept = outcome.clients[client]["state"]
        assert torch.equal(kept["model"], state[0]) and torch.equal(kept["buffers"], state[1])


def test_pooled_is_one_client_with_all_the_data(tmp_path: Path) -> None:
    """However the partition deals the samples, as long as it deals them all; a client holds them in ascending order."""
    pooled = run(job_of({"name": "pooled"}), tmp_path / "pooled", 3)
    data = json.loads(job_of({"name": "local"}).canonical())["data"] | {"partition": {"name": "iid"}}
    local = run(job_of({"name": "local"}, clients=1, participation=1.0, data=data), tmp_path / "local")
    assert_same_bits(pooled.tensors(), local.tensors())
    assert pooled.rows[-1]["accuracy"] == local.rows[-1]["accuracy"]


def test_one_client_of_fedavg_is_local(tmp_path: Path) -> None:
    """x + (y - x) is y up to rounding: one round of one client."""
    average, local = same_run({"name": "fedavg"}, {"name": "local"}, tmp_path, participation=1, rounds=1)
    ((_, record),) = local.clients.items()
    torch.testing.assert_close(average.server["model"], record["state"]["model"], rtol=1e-6, atol=1e-7)


def test_hyper_parameters_that_do_not_go_together_are_refused() -> None:
    for table, local, message in (
        ({"name": "scaffold"}, {"optimizer": "adam"}, "algorithm.option: Option II needs SGD"),
        ({"name": "scaffold", "payload": "derived"}, LOCAL, 'algorithm.payload: "derived" needs'),
        ({"name": "scaffold", "payload": "derived", "option": "I"}, STEPS, 'algorithm.payload: "derived" needs'),
        ({"name": "scaffold", "weighting": "examples"}, LOCAL, "algorithm.weighting"),
        ({"name": "feddyn", "server_lr": 0.5}, LOCAL, "algorithm.server_lr"),
        ({"name": "feddyn", "alpha": 0.0}, LOCAL, "algorithm.alpha"),
        ({"name": "fedprox", "mu": -1.0}, LOCAL, "algorithm.mu"),
    ):
        with pytest.raises(BadInput, match=message):
            job_of(table, local=local)


# --- fixed points on quadratics ---------------------------------------------------------------------------------------
CURVATURES = (1.0, 2.0, 3.0, 4.0)
CENTRES = (-2.0, 3.0, 1.0, -0.5)
OPTIMUM = sum(a * e for a, e in zip(CURVATURES, CENTRES, strict=True)) / sum(CURVATURES)
"""Minimum of the mean of a/2 (w - e)^2: (-2 + 6 + 3 - 2)/10 = 0.5."""


def on_quadratics(algorithm: FedAvg, participants: int, rounds: int, **local: Any) -> float:
    """The model after so many rounds of `participants` random clients of four, each with one quadratic."""
    clients = [quadratic([a], [e]) for a, e in zip(CURVATURES, CENTRES, strict=True)]
    simulation = Simulation(algorithm, Quadratic([5.0]), clients, **local)
    for round_ in range(rounds):
        chosen: Iterable[int] = numpy_generator(1, "clients", round_).choice(4, participants, replace=False).tolist()
        simulation.run(chosen)
        if not abs(simulation.server["model"].item()) < 1e6:
            return float("inf")
    return float(simulation.server["model"])


def test_the_optimum_of_the_quadratics() -> None:
    assert OPTIMUM == 0.5


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_finds_the_optimum_with_two_clients_of_four(option: Any) -> None:
    model = on_quadratics(Scaffold(option=option), 2, 200, lr=0.05, steps=5)
    assert model == pytest.approx(OPTIMUM, abs=1e-5)


def test_fedavg_does_not() -> None:
    """Client i contracts towards e_i by r_i = (1 - 0.05 a_i)^5: FedAvg stops at sum (1 - r_i) e_i / sum (1 - r_i)."""
    shares = [1 - (1 - 0.05 * a) ** 5 for a in CURVATURES]
    stops = float(np.dot(shares, CENTRES) / sum(shares))
    assert abs(stops - OPTIMUM) > 0.02
    model = on_quadratics(FedAvg(weighting="uniform"), 4, 60, lr=0.05, steps=5)
    assert model == pytest.approx(stops, abs=1e-5)


def test_scaffold_with_momentum_needs_its_displacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 5, momentum 0.9: with the printed K lr the control variates are 2.6 times too large, and it diverges."""
    options: dict[str, Any] = {"lr": 0.02, "steps": 5, "momentum": 0.9}
    assert on_quadratics(Scaffold(), 2, 250, **options) == pytest.approx(OPTIMUM, abs=1e-5)
    monkeypatch.setattr(learning, "displacement", lambda local, rate, steps: rate * steps)
    assert on_quadratics(Scaffold(), 2, 250, **options) == float("inf")


@pytest.mark.parametrize(("participants", "rounds"), [(1, 300), (2, 200), (4, 100)])
def test_feddyn_finds_the_optimum(participants: int, rounds: int) -> None:
    """One client of four a round is enough, though its local problem is solved inexactly."""
    model = on_quadratics(FedDyn(alpha=1.0), participants, rounds, lr=0.1, steps=10)
    assert model == pytest.approx(OPTIMUM, abs=1e-5)


def test_feddyn_memories_become_the_gradients_at_the_optimum() -> None:
    """g_k = -alpha lambda_k is the gradient of client k at the optimum, a_k (0.5 - e_k): 2.5, -5, -1.5, 4."""
    clients = [quadratic([a], [e]) for a, e in zip(CURVATURES, CENTRES, strict=True)]
    simulation = Simulation(FedDyn(alpha=1.0), Quadratic([5.0]), clients, lr=0.1, steps=10)
    for _ in range(100):
        simulation.run(range(4))
    for state, gradient in zip(simulation.states, (2.5, -5.0, -1.5, 4.0), strict=True):
        close(-1.0 * state["memory"], [gradient], 1e-4)
