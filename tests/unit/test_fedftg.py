"""FedFTG beside its bases: nothing changes without fine-tuning, and only the model changes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpifed.algorithms import fedftg
from mpifed.algorithms.fedavg import FedAvg
from mpifed.algorithms.fedftg import FedFTG
from mpifed.algorithms.local import Local
from mpifed.comm.inprocess import InProcess
from mpifed.errors import BadInput
from mpifed.federation.federation import Federation
from mpifed.types import leaves
from tests.algorithm_table import CLASSES, Outcome, assert_same_bits, job_of, run

BASES: list[dict[str, Any]] = [
    {"name": "fedavg"},
    {"name": "fedprox", "mu": 0.5},
    {"name": "feddyn", "alpha": 0.1},
    {"name": "scaffold"},
    {"name": "scaffold", "option": "I"},
]
by_base = pytest.mark.parametrize("base", BASES, ids=lambda base: "-".join(map(str, base.values())))
SMALL: dict[str, Any] = {"name": "fedftg", "iterations": 2, "batch_size": 8, "noise": 4, "channels": 8}


def outcome(folder: Path, table: dict[str, Any], **changes: Any) -> Outcome:
    return run(job_of(table, **changes), folder)


@by_base
def test_without_fine_tuning_it_is_the_base_bit_for_bit(base: dict[str, Any], tmp_path: Path) -> None:
    """Server and clients; on the wire class counts are added."""
    plain = outcome(tmp_path / "base", base)
    wrapped = outcome(tmp_path / "fedftg", SMALL | {"base": base, "iterations": 0})
    assert_same_bits(dict(leaves(wrapped.server["base"])), dict(leaves(plain.server)))
    assert_same_bits(
        dict(leaves({str(client): state for client, state in sorted(wrapped.clients.items())})),
        dict(leaves({str(client): state for client, state in sorted(plain.clients.items())})),
    )
    assert [row["accuracy"] for row in wrapped.rows] == [row["accuracy"] for row in plain.rows]
    counts = {(t, "up.class_counts"): 4 * CLASSES * 3 for t in (1, 2, 3)}
    assert wrapped.logical() == plain.logical() | counts


@by_base
def test_fine_tuning_changes_the_model_and_its_statistics_alone(base: dict[str, Any], tmp_path: Path) -> None:
    """After one round: memories and control variates are the base's."""
    plain = outcome(tmp_path / "base", base, rounds=1).server
    tuned = outcome(tmp_path / "fedftg", SMALL | {"base": base}, rounds=1).server["base"]
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert changed == {"model", "buffers"}


@pytest.mark.parametrize("policy", ["train", "restored", "frozen"])
def test_what_happens_to_running_statistics(policy: str, tmp_path: Path) -> None:
    plain = outcome(tmp_path / "base", {"name": "fedavg"}, rounds=1).server
    tuned = outcome(tmp_path / policy, SMALL | {"batch_norm": policy}, rounds=1).server["base"]
    assert torch.equal(plain["buffers"], tuned["buffers"]) == (policy != "train")
    assert not torch.equal(plain["model"], tuned["model"])


def test_statistics_of_the_clients_own_travel_to_the_server(tmp_path: Path) -> None:
    """The teachers need them, though the base does not send them; everybody's own are kept beside."""
    model = {"name": "tests.algorithm_table:model", "buffers": "local"}
    result = outcome(tmp_path, SMALL, model=model, rounds=1)
    assert result.logical()[1, "up.buffers"] == 3 * 4 * 6
    assert all(set(state["state"]) == {"buffers"} for state in result.clients.values())


def test_the_student_has_the_mean_of_the_clients_own_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none are averaged: the generator asks the student in evaluation mode, which the initial ones, mean 0 and
    variance 1, do not fit."""
    seen: list[torch.Tensor] = []
    original = fedftg.train_generator

    def spy(generate: Any, parameters: Any, adam: Any, student: Any, *rest: Any) -> None:
        seen.append(student.buffers.clone())
        original(generate, parameters, adam, student, *rest)

    monkeypatch.setattr(fedftg, "train_generator", spy)
    model = {"name": "tests.algorithm_table:model", "buffers": "local"}
    result = outcome(tmp_path, SMALL, model=model, rounds=1)
    kept = torch.stack([state["state"]["buffers"] for state in result.clients.values()])
    torch.testing.assert_close(seen[0], kept.mean(dim=0))


def test_teachers_are_the_clients_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weighted mean is what the base makes of them, and they differ; their statistics likewise."""
    seen: list[Any] = []

    def keep(self: FedFTG, env: Any, server: Any, base: Any, clients: Any, counts: Any, round_: int) -> Any:
        seen.append((base, *clients, counts))
        return {}, {}

    monkeypatch.setattr(FedFTG, "fine_tune", keep)
    job = job_of(SMALL, rounds=1)
    run(job, tmp_path)
    ((base, models, buffers, counts),) = seen
    federation = Federation.build(job, InProcess.alone())
    sampled = federation.roster.sample(1)
    assert counts.tolist() == federation.histogram[list(sampled)].tolist()
    weights = counts.sum(dim=1).double() / counts.sum()
    torch.testing.assert_close((weights[:, None] * models).sum(dim=0).float(), base["model"])
    torch.testing.assert_close((weights[:, None] * buffers).sum(dim=0).float(), base["buffers"])
    assert len(torch.unique(models, dim=0)) == len(sampled) == 3


def test_the_student_learns_what_the_teachers_say_by_class_of_images_that_stand_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target is the sum of the teachers' probabilities, each sample's weighted by its class; the generator is in
    evaluation mode (an image does not depend on the others of its batch), and goes on from round to round."""
    begun, given, checked = [], [], 0
    train_generator, train_student = fedftg.train_generator, fedftg.train_student

    def spy_generator(generate: Any, parameters: Any, adam: Any, student: Any, *rest: Any) -> None:
        begun.append(torch.cat([part.detach().reshape(-1) for part in parameters]))
        given[:] = [generate, *rest[:4]]
        train_generator(generate, parameters, adam, student, *rest)

    def spy_student(student: Any, sgd: Any, images: Any, target: Any, *rest: Any) -> None:
        nonlocal checked
        generate, teachers, noise, labels, weights = given
        with torch.no_grad():
            torch.testing.assert_close(generate(noise[:3], labels[:3]), images[:3])
            expected = sum(w[:, None] * p for w, p in zip(weights, teachers(images).softmax(dim=2), strict=True))
        torch.testing.assert_close(target, expected)
        torch.testing.assert_close(target.sum(dim=1), torch.ones(len(target)))
        checked += 1
        train_student(student, sgd, images, target, *rest)

    monkeypatch.setattr(fedftg, "train_generator", spy_generator)
    monkeypatch.setattr(fedftg, "train_student", spy_student)
    one = outcome(tmp_path / "1", SMALL, rounds=1).server["generator"]
    begun.clear()
    outcome(tmp_path / "2", SMALL, rounds=2)
    assert checked == 6 and len(begun) == 4 and torch.equal(begun[2], one)


def test_step_sizes_fall_and_optimisers_are_new_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[tuple[float, float]]] = {"Sgd": [], "Adam": []}

    def spy(name: str) -> Any:
        original = getattr(fedftg, name)

        def make(parameters: Any, settings: Any, rate: float) -> Any:
            seen[name].append((settings.weight_decay, rate))
            return original(parameters, settings, rate)

        return make

    for name in seen:
        monkeypatch.setattr(fedftg, name, spy(name))
    table = {"lr_decay": 0.5, "student_lr": 0.2, "generator_lr": 0.02, "student_weight_decay": 0.25}
    outcome(tmp_path, SMALL | table, rounds=2)
    assert seen == {"Sgd": [(0.25, 0.2), (0.25, 0.1)], "Adam": [(0.0, 0.02), (0.0, 0.01)]}


def test_official_and_paper_differ_and_switches_win(tmp_path: Path) -> None:
    paper, official = FedFTG(variant="paper"), FedFTG()
    assert (paper.settings.discrepancy, official.settings.discrepancy) == ("kl", "l1")
    assert FedFTG(variant="official", discrepancy="kl", teacher_gradient=True).settings != official.settings
    assert FedFTG(variant="official", teacher_gradient=True).settings.teacher_gradient
    assert not FedFTG(variant="paper", teacher_gradient=False).settings.teacher_gradient
    models = [outcome(tmp_path / v, SMALL | {"variant": v}).server["base"]["model"] for v in ("paper", "official")]
    assert not torch.equal(*models)


def test_the_generator_is_of_images_where_the_inputs_are(tmp_path: Path) -> None:
    federation = Federation.build(
        job_of(SMALL, data={"name": "digits"}, model={"name": "mlp", "hidden": [8]}), InProcess.alone()
    )
    generator = FedFTG(noise=4, channels=2).generator(federation.env).model
    images = generator.module(torch.randn(3, 4), torch.tensor([0, 1, 2]))
    assert images.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("base", ["local", "pooled", "fedftg"])
def test_a_base_without_one_model_is_refused(base: str) -> None:
    with pytest.raises(BadInput, match=r"^algorithm.base: "):
        job_of({"name": "fedftg", "base": base})


def test_the_bases_own_demands_hold() -> None:
    with pytest.raises(BadInput, match="local.optimizer|option"):
        job_of({"name": "fedftg", "base": "scaffold"}, local={"optimizer": "adam"})
    with pytest.raises(ValueError, match="base: FedFTG"):
        FedFTG(base=Local()).check(None)
    assert FedFTG(base=FedAvg()).stateful is False
