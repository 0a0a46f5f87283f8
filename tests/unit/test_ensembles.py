"""FedEnsemble and FedDF: the server has every client's model, and what it does with them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpifed.algorithms import feddf
from mpifed.algorithms.base import Ensemble
from mpifed.algorithms.fedensemble import FedEnsemble
from mpifed.comm.inprocess import InProcess
from mpifed.errors import BadInput
from mpifed.federation.env import Context
from mpifed.federation.federation import Federation
from mpifed.learning.distillation import ensemble_logits, kl_divergence
from mpifed.learning.local import local_training
from tests.algorithm_table import CLIENTS, FEDDF, PARTICIPANTS, assert_same_bits, job_of, run
from tests.algorithm_table import PUBLIC as PUBLIC_DATA

PUBLIC = {"data": PUBLIC_DATA}
ENSEMBLE = {"name": "fedensemble"}
LOCAL_STATISTICS = {"name": "tests.algorithm_table:model", "buffers": "local"}


def trained(federation: Federation, client: int, round_: int, model: Tensor, buffers: Tensor) -> tuple[Tensor, Tensor]:
    """What one client makes of a model."""
    ctx = Context(
        federation.env, client, round_, "train", partial(federation.samples, client), 1.0, federation.job.local
    )
    ctx.model.load(model, buffers)
    local_training(ctx)
    return ctx.model.parameters.detach().clone(), ctx.model.buffers.clone()


# --- FedEnsemble ------------------------------------------------------------------------------------------------------
def test_fedensemble_trains_as_fedavg(tmp_path: Path) -> None:
    average, ensemble = (run(job_of({"name": name}), tmp_path / name) for name in ("fedavg", "fedensemble"))
    for name in ("model", "buffers"):
        assert torch.equal(ensemble.server[name], average.server[name])
    assert [row["loss"] for row in ensemble.rows] != [row["loss"] for row in average.rows]


@pytest.mark.parametrize("changes", [{}, {"model": LOCAL_STATISTICS}], ids=["average", "local"])
def test_members_are_the_clients_models_with_their_own_statistics(changes: dict[str, Any], tmp_path: Path) -> None:
    """Also where running statistics are not averaged. In local mode those of earlier rounds count."""
    outcome = run(job_of(ENSEMBLE, rounds=1, **changes), tmp_path)
    federation = Federation.build(job_of(ENSEMBLE, rounds=1, **changes), InProcess.alone())
    clients, server = federation.roster.sample(1), outcome.server
    assert server["members"].shape[0] == len(clients) == PARTICIPANTS
    for client, model, buffers in zip(clients, server["members"], server["member_buffers"], strict=True):
        expected = trained(federation, client, 1, *federation.env.initial())
        torch.testing.assert_close(model, expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(buffers, expected[1], rtol=1e-6, atol=1e-6)


def test_clients_that_were_not_asked_count_with_what_was_sent(tmp_path: Path) -> None:
    """3 of 5 trained: the model that was sent in that round stands for two."""
    outcome = run(job_of(ENSEMBLE, rounds=2), tmp_path / "2")
    before = run(job_of(ENSEMBLE, rounds=1), tmp_path / "1").server
    env = Federation.build(job_of(ENSEMBLE), InProcess.alone()).env
    predictor = FedEnsemble().predictor(outcome.server, env)
    assert predictor.weights == (1.0, 1.0, 1.0, 2.0)
    assert torch.equal(predictor.members[-1][0], before["model"])
    assert torch.equal(predictor.members[-1][1], before["buffers"])
    alone = FedEnsemble(inactive="left_out").predictor(outcome.server, env)
    assert isinstance(alone, Ensemble) and len(alone.members) == len(alone.weights) == PARTICIPANTS
    everybody = run(job_of(ENSEMBLE, rounds=1, participation=1.0), tmp_path / "all").server
    assert FedEnsemble().predictor(everybody, env).weights == (1.0,) * CLIENTS


# --- FedDF ------------------------------------------------------------------------------------------------------------
def test_feddf_without_steps_is_fedavg(tmp_path: Path) -> None:
    average = run(job_of({"name": "fedavg"}), tmp_path / "average")
    fused = run(job_of(FEDDF | {"steps": 0}, **PUBLIC), tmp_path / "fused")
    assert_same_bits(fused.tensors(), average.tensors())


def test_feddf_needs_a_public_set() -> None:
    with pytest.raises(BadInput, match="data.public"):
        job_of(FEDDF)


def test_the_student_starts_from_the_average_and_comes_closer_to_the_ensemble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teachers are the round's clients; the loss falls on samples that were held out."""
    seen: dict[str, Any] = {}
    original = feddf.distil

    def spy(student: Any, teacher: Any, inputs: Any, samples: Tensor, held_out: Tensor, **options: Any) -> int:
        x = inputs(held_out)
        seen.update(start=student.parameters.detach().clone(), x=x, target=teacher(x), used=samples, held_out=held_out)
        steps = original(student, teacher, inputs, samples, held_out, **options)
        seen["steps"] = steps
        return steps

    monkeypatch.setattr(feddf, "distil", spy)
    changes = PUBLIC | {"rounds": 1}
    table = FEDDF | {"steps": 60, "measure_every": 5}
    server = run(job_of(table, **changes), tmp_path / "fused").server
    average = run(job_of({"name": "fedavg"}, rounds=1), tmp_path / "average").server
    assert torch.equal(seen["start"], average["model"])
    assert not set(seen["used"].tolist()) & set(seen["held_out"].tolist())
    assert len(seen["used"]) + len(seen["held_out"]) == 60 and len(seen["held_out"]) == 6

    federation = Federation.build(job_of(table, **changes), InProcess.alone())
    members = [trained(federation, client, 1, *federation.env.initial()) for client in federation.roster.sample(1)]
    stacked = [torch.stack(parts) for parts in zip(*members, strict=True)]
    student = federation.env.model()
    mean_logits = ensemble_logits(student, stacked[0], stacked[1], seen["x"]).mean(dim=0)
    torch.testing.assert_close(seen["target"], mean_logits, rtol=1e-5, atol=1e-5)

    def disagreement(state: dict[str, Tensor]) -> float:
        student.load(state["model"], state["buffers"])
        student.eval()
        with torch.no_grad():
            return float(kl_divergence(student(seen["x"]), mean_logits))

    assert disagreement(server) < 0.8 * disagreement(average)


def test_frozen_statistics_stay_the_averaged_ones(tmp_path: Path) -> None:
    """And, training, those of the public set move in."""
    average = run(job_of({"name": "fedavg"}, rounds=1), tmp_path / "average").server["buffers"]
    for policy, same in (("frozen", True), ("train", False)):
        table = FEDDF | {"batch_norm": policy, "lr": 0.02}
        buffers = run(job_of(table, **PUBLIC, rounds=1), tmp_path / policy).server["buffers"]
        assert torch.equal(buffers, average) == same


def test_few_steps_use_few_public_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 steps of 16: teachers answer 32 samples, not all; other ones in the next round."""
    used: list[list[int]] = []
    original = feddf.distil

    def spy(*arguments: Any, **options: Any) -> int:
        used.append(arguments[3].tolist())
        return original(*arguments, **options)

    monkeypatch.setattr(feddf, "distil", spy)
    run(job_of(FEDDF | {"steps": 2}, **PUBLIC, rounds=2), tmp_path)
    assert [len(some) for some in used] == [32, 32] and used[0] != used[1]
