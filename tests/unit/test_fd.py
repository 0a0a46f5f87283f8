"""FD and FedDistill in runs: identities, the bytes of the paper's table, models of the clients' own, lost replies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mpifed.algorithms.base import Absent, ClientContext, Reply
from mpifed.algorithms.fd import FD
from mpifed.comm.inprocess import InProcess
from mpifed.errors import BadInput
from mpifed.federation.federation import Federation
from mpifed.federation.plan import planned_bytes
from mpifed.job import load
from mpifed.types import Payload, State
from tests.algorithm_table import CLIENTS, assert_same_bits, job_of, run

HERE = "tests.unit.test_fd"
JOBS = Path(__file__).resolve().parents[2] / "jobs"


# --- identities -------------------------------------------------------------------------------------------------------
def test_fd_without_its_term_is_training_alone(tmp_path: Path) -> None:
    alone = run(job_of({"name": "local"}), tmp_path / "local").clients
    taught = run(job_of({"name": "fd", "weight": 0.0}), tmp_path / "fd").clients
    assert alone.keys() == taught.keys()
    for client, kept in alone.items():
        assert_same_bits(kept["state"], {name: taught[client]["state"][name] for name in ("model", "buffers")})


def test_the_first_round_has_no_teacher_and_the_second_has(tmp_path: Path) -> None:
    for rounds, same in ((1, True), (2, False)):
        alone, taught = (
            run(job_of(table, rounds=rounds, participation=1.0), tmp_path / f"{table['name']}{rounds}").clients
            for table in ({"name": "local"}, {"name": "fd", "weight": 1.0})
        )
        equal = [torch.equal(alone[c]["state"]["model"], taught[c]["state"]["model"]) for c in alone]
        assert equal == [same] * CLIENTS


def test_feddistill_plus_without_its_term_is_fedavg(tmp_path: Path) -> None:
    average = run(job_of({"name": "fedavg"}), tmp_path / "fedavg")
    plus = run(job_of({"name": "feddistill_plus", "weight": 0.0}), tmp_path / "plus")
    for name in ("model", "buffers"):
        assert torch.equal(average.server[name], plus.server[name])
    assert [row["loss"] for row in average.rows] == [row["loss"] for row in plus.rows]


@pytest.mark.parametrize("switches", [{}, {"variant": "paper"}, {"weighting": "count"}], ids=["", "paper", "count"])
def test_unicast_and_broadcast_train_the_same_bits(switches: dict[str, Any], tmp_path: Path) -> None:
    """Three of five clients a round, with a codec that changes what crosses in each direction alike."""
    one, other = (
        run(
            job_of({"name": "fd", "exchange": exchange, **switches}, rounds=4, codec={"up.outputs": "half"}),
            tmp_path / exchange,
            3,
        )
        for exchange in ("unicast", "broadcast")
    )
    assert one.clients.keys() == other.clients.keys()
    for client, kept in one.clients.items():
        for name in ("model", "buffers", "teacher"):
            assert torch.equal(kept["state"][name], other.clients[client]["state"][name])


# --- bytes ------------------------------------------------------------------------------------------------------------
MNIST_LIKE = ("data.name=synthetic", "data.samples=600", "data.test_samples=60", "data.partition.samples=60")


@pytest.mark.parametrize(
    ("job", "bits"),
    [("paper_fd", 16 * (100 + 100) * 32), ("paper_fl", 16 * (1_199_648 + 1_199_648) * 32)],
)
def test_the_bits_of_the_papers_table(job: str, bits: int) -> None:
    """Up and down of one device: 102,400 for FD, 1,228,439,552 for FL. The data set has no say in it."""
    assert bits == {"paper_fd": 102_400, "paper_fl": 1_228_439_552}[job]
    settings = load((JOBS / "fd" / f"{job}.toml").read_text(), MNIST_LIKE)
    totals, open_kinds = planned_bytes(Federation.build(settings, InProcess.alone()))
    assert open_kinds == {}
    assert 8 * sum(totals.values()) == bits * settings.clients


def test_the_ledger_of_fds_job_is_the_papers(tmp_path: Path) -> None:
    """All 16 rounds, with a small model, whose size has no say in it, on two ranks."""
    small = ("model.name=linear", "local.steps=1", "clients=4", "data.input_shape=[1, 4, 4]", "device=cpu")
    settings = load((JOBS / "fd" / "paper_fd.toml").read_text(), (*MNIST_LIKE, *small, "evaluate.every_rounds=0"))
    logical = run(settings, tmp_path, 2).logical()
    assert sum(logical.values()) * 8 == 4 * 102_400
    assert {kind for _, kind in logical} == {"up.outputs", "down.teacher"}
    assert all(size == 4 * 400 for size in logical.values()) and len(logical) == 2 * 16


# --- what a federation brings -----------------------------------------------------------------------------------------
OWN = [{"name": "mlp", "hidden": [5]}, {"name": "mlp", "hidden": [4, 3]}]


@pytest.mark.parametrize("name", ["fd", "feddistill"])
def test_models_of_the_clients_own(name: str, tmp_path: Path) -> None:
    job = job_of({"name": name}, client_models=OWN)
    alone = run(job, tmp_path / "1")
    assert_same_bits(run(job, tmp_path / "3", 3).tensors(), alone.tensors())
    assert {record["state"]["model"].numel() for record in alone.clients.values()} == {43, 47}


@dataclass(frozen=True)
class OneIsLost(FD):
    """Client 1 trains, but its upload never arrives."""

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        after, answer = super().client(state, down, ctx)
        return after, Absent("lost") if ctx.id == 1 else answer


@dataclass(frozen=True)
class OneFails(FD):
    """Client 1 cannot train."""

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        if ctx.id == 1:
            raise RuntimeError("out of luck")
        return super().client(state, down, ctx)


@pytest.mark.parametrize(
    ("kind", "exchange"), [("OneIsLost", "unicast"), ("OneFails", "unicast"), ("OneFails", "broadcast")]
)
def test_a_device_whose_upload_does_not_arrive(kind: str, exchange: str, tmp_path: Path) -> None:
    """It is part of no mean, and is taught that of all others."""
    table = {"name": f"{HERE}:{kind}", "exchange": exchange}
    outcome = run(job_of(table, participation=1.0, rounds=1), tmp_path, 3)
    states = {client: record["state"] for client, record in outcome.clients.items()}
    assert outcome.rows[0]["replies"] == CLIENTS - 1
    everybody = states[1]["holders"]
    for client in (0, 2, 3, 4):
        held = everybody - states[client]["holders"]
        assert set(held.tolist()) <= {0, 1} and held.any()
    assert int(everybody.max()) <= CLIENTS - 1


@pytest.mark.parametrize(("name", "protocol"), [("feddistill", "own"), ("feddistill_plus", "sent")])
def test_own_tests(name: str, protocol: str, tmp_path: Path) -> None:
    """FedGen's protocol: every user on its own test samples, FedDistill's with its own model. In round 1 all have the
    same untrained one; a user that never took part still does."""
    data = json.loads(job_of({"name": name}).canonical())["data"]
    data["partition"] = {"name": "fedgen", "alpha": 0.5, "min_size": 3}
    rows = run(job_of({"name": name}, rounds=6, data=data, evaluate={"own": True}), tmp_path, 3).rows
    assert all(0 <= row["accuracy_own"] <= 1 for row in rows)
    assert rows[-1]["accuracy_own"] > rows[0]["accuracy_own"]
    assert ("accuracy_min" in rows[-1]) == (protocol == "own")


def test_hyper_parameters_that_do_not_go_together_are_refused() -> None:
    for table, message in (
        ({"average": "logits", "counts": False}, "algorithm.counts: a row of zeros"),
        ({"average": "logits", "variant": "paper"}, "algorithm.counts: a row of zeros"),
        ({"loss": "mse", "variant": "paper"}, "algorithm.loss: mse with m_minus_1"),
        ({"weighting": "count", "variant": "paper"}, "algorithm.weighting: count needs"),
        ({"weighting": "count", "denominator": "m_minus_1"}, "algorithm.weighting: count needs"),
        ({"weight": -1.0}, "algorithm.weight"),
    ):
        with pytest.raises(BadInput, match=message):
            job_of({"name": "fd", **table})
