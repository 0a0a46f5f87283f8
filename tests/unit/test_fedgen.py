"""FedGen: its identities, its payload, sharing of heads, and what other implementations get wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpifed.algorithms import fedgen
from mpifed.algorithms.base import Field
from mpifed.algorithms.fedgen import VARIANTS, FedGen
from mpifed.comm.inprocess import InProcess
from mpifed.errors import BadInput
from mpifed.federation.env import Context
from mpifed.federation.federation import Federation
from mpifed.learning.generation import label_prior
from mpifed.learning.latent import Heads
from mpifed.learning.local import local_training
from mpifed.models.classifier import Classifier, Parts
from mpifed.models.flat import FlatModel
from mpifed.rng import torch_generator
from tests.algorithm_table import (
    CLIENTS,
    DATA,
    FEDGEN,
    PARTICIPANTS,
    ROUNDS,
    STEPS,
    Outcome,
    assert_same_bits,
    job_of,
    run,
)

OFF: dict[str, Any] = {"generated_weight": 0.0, "latent_kl_weight": 0.0}
"""No regularisation: the generator is trained, and nobody is sent it."""


# --- the switches -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_variant_sets_what_is_not_given(variant: Any) -> None:
    algorithm = FedGen(variant=variant)
    assert {name: getattr(algorithm, name) for name in VARIANTS[variant]} == VARIANTS[variant]
    assert FedGen(variant=variant, smoothing=0.25, latent_kl_weight=0.0).smoothing == 0.25
    assert FedGen(variant=variant, latent_kl_weight=0.0).latent_kl_weight == 0.0


def test_the_variants_differ_in_every_switch_and_in_what_they_learn(tmp_path: Path) -> None:
    assert VARIANTS["paper"].keys() == VARIANTS["official"].keys()
    assert all(VARIANTS["paper"][name] != value for name, value in VARIANTS["official"].items())
    one, other = (run(job_of(FEDGEN | {"variant": name}), tmp_path / name).server for name in VARIANTS)
    assert not torch.equal(one["model"], other["model"]) and not torch.equal(one["generator"], other["generator"])


@pytest.mark.parametrize(
    "switch",
    [
        {"labels": "prior"},
        {"counts": "held"},
        {"smoothing": 0.0},
        {"ensemble": "mean_logits"},
        {"ensemble": "mean_weight_ce"},
        {"noise": "normal"},
        {"diversity_weight": 0.0},
        {"student_weight": 0.5},
        {"embedding": True},
    ],
    ids=str,
)
def test_every_switch_of_the_generator_changes_it(switch: dict[str, Any], tmp_path: Path) -> None:
    """In round 1, where clients do not know it yet: their models are as without the switch."""
    plain, switched = (run(job_of(FEDGEN | more, rounds=1), tmp_path / str(len(more))).server for more in ({}, switch))
    assert torch.equal(plain["model"], switched["model"])
    assert plain["generator"].shape != switched["generator"].shape or not torch.equal(
        plain["generator"], switched["generator"]
    )


@pytest.mark.parametrize(
    "switch", [{"regularised_steps": 1}, {"decay": 0.5}, {"synthetic_batch": 3}, OFF, {"weighting": "uniform"}], ids=str
)
def test_every_switch_of_the_clients_changes_their_models(switch: dict[str, Any], tmp_path: Path) -> None:
    plain, switched = (run(job_of(FEDGEN | more, rounds=2), tmp_path / str(len(more))).server for more in ({}, switch))
    assert not torch.equal(plain["model"], switched["model"])


def test_order_matters_to_the_student_alone(tmp_path: Path) -> None:
    def generator(name: str, **more: Any) -> Tensor:
        return run(job_of(FEDGEN | more, rounds=1), tmp_path / name).server["generator"]

    first = {"order": "aggregate_first"}
    assert torch.equal(generator("1"), generator("2", **first))
    assert not torch.equal(generator("3", student_weight=1.0), generator("4", student_weight=1.0, **first))


def test_weights_fall_from_round_to_round_and_zero_stays_zero() -> None:
    """10 * 0.98^199 = 0.1795 in round 200; never below 0.0001."""
    algorithm = FedGen()
    assert algorithm.scheduled(10.0, 1) == 10.0
    assert algorithm.scheduled(10.0, 200) == pytest.approx(0.1795, abs=1e-4)
    assert algorithm.scheduled(10.0, 2000) == 1e-4
    assert algorithm.scheduled(0.0, 5) == 0.0
    assert FedGen(variant="paper").scheduled(1.0, 2000) == 1.0


# --- identities -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_without_regularisation_it_is_fedavg(weighting: str, tmp_path: Path) -> None:
    """Bit for bit, though body and head travel apart; and the generator is neither used nor sent."""
    average = run(job_of({"name": "fedavg", "weighting": weighting}), tmp_path / "average")
    plain = run(job_of(FEDGEN | OFF | {"weighting": weighting}), tmp_path / "plain")
    for name in ("model", "buffers"):
        assert torch.equal(plain.server[name], average.server[name])
    assert [row["accuracy"] for row in plain.rows] == [row["accuracy"] for row in average.rows]
    assert not any("generator" in kind or "prior" in kind for _, kind in plain.logical())


def test_the_first_round_is_fedavgs(tmp_path: Path) -> None:
    """Nothing has been learned that could be sent. In the second it differs."""
    table = FEDGEN | {"variant": "official"}
    for rounds, same in ((1, True), (2, False)):
        average, gen = (
            run(job_of(algorithm, rounds=rounds), tmp_path / f"{rounds}{algorithm['name']}").server
            for algorithm in ({"name": "fedavg"}, table)
        )
        assert torch.equal(gen["model"], average["model"]) == same


def test_no_steps_leave_the_generator_as_it_was(tmp_path: Path) -> None:
    """Its running statistics too, and Adam's moments."""
    job = job_of(FEDGEN | {"generator_steps": 0})
    server = run(job, tmp_path).server
    algorithm: Any = job.algorithm.make()
    _, parameters, buffers = algorithm.generator(Federation.build(job, InProcess.alone()).env)
    assert torch.equal(server["generator"], parameters) and torch.equal(server["generator_statistics"], buffers)
    assert float(server["optimizer"]["steps"]) == 0 and not server["optimizer"]["mean"].any()


def test_the_generator_learns_on_with_its_moments(tmp_path: Path) -> None:
    """3 steps a round; the moments of Adam and the running statistics last, and those move as it trains."""
    job = job_of(FEDGEN)
    server = run(job, tmp_path).server
    assert float(server["optimizer"]["steps"]) == 3 * ROUNDS
    algorithm: Any = job.algorithm.make()
    start = algorithm.generator(Federation.build(job, InProcess.alone()).env).buffers
    assert server["optimizer"]["square"].max() > 0 and bool((server["generator_statistics"] != start).all())


def test_the_generators_step_size_falls_and_its_weights_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    original = fedgen.Adam

    def spy(parameters: Any, settings: Any, rate: float) -> Any:
        seen.append((settings.weight_decay, rate))
        return original(parameters, settings, rate)

    monkeypatch.setattr(fedgen, "Adam", spy)
    table = {"generator_lr": 0.01, "generator_lr_decay": 0.5, "generator_weight_decay": 0.25}
    run(job_of(FEDGEN | table), tmp_path)
    assert seen == [(0.25, 0.01), (0.25, 0.005), (0.25, 0.0025)]


def test_a_client_takes_the_generator_as_it_was_sent(tmp_path: Path) -> None:
    """In evaluation mode, with the running statistics of the server's. Half as many generated samples count half."""
    table = FEDGEN | {"synthetic_batch": 4, "decay": 0.5}
    job = job_of(table, rounds=1)
    server = run(job, tmp_path).server
    federation = Federation.build(job, InProcess.alone())
    algorithm: Any = federation.algorithm
    samples = partial(federation.samples, 0)
    ctx = Context(federation.env, 0, 2, "train", samples, 1.0, federation.job.local)  # batches of 8
    loss = algorithm.objective(algorithm.download(server, 2), ctx)
    assert not loss.generator.training
    assert torch.equal(loss.generator.parameters, server["generator"])
    assert torch.equal(loss.generator.buffers, server["generator_statistics"])
    assert (loss.batch_size, loss.generated_weight, loss.latent_kl_weight) == pytest.approx((4, 0.3 / 4, 0.1))


def test_the_generator_depends_on_the_seed(tmp_path: Path) -> None:
    """Its start and its batches; the same seed gives the same bits."""
    one, again, other = (
        run(job_of(FEDGEN, seed=seed, rounds=1), tmp_path / name).server["generator"]
        for seed, name in ((0, "one"), (0, "again"), (1, "other"))
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_heads_come_to_know_what_is_generated(tmp_path: Path) -> None:
    """The purpose of it all: after some rounds the global head takes generated representations for their labels."""
    table = FEDGEN | {"generator_steps": 40, "hidden": 16, "noise_size": 4}
    job = job_of(table, rounds=8, participation=1.0)
    server = run(job, tmp_path).server
    federation = Federation.build(job, InProcess.alone())
    algorithm: Any = job.algorithm.make()
    generator = algorithm.generator(federation.env).model
    generator.load(server["generator"], server["generator_statistics"])
    generator.eval()
    labels = torch.arange(3).repeat(50)
    heads = Heads(*algorithm.parts(federation.env).linear(algorithm.parts(federation.env).head(server["model"])[None]))
    with torch.no_grad():
        latent = generator.module(torch.rand(150, 4, generator=torch_generator(0, "noise")), labels)
        accuracy = (heads(latent)[0].argmax(dim=1) == labels).double().mean()
    assert accuracy > 0.9
    spread = latent[labels == 0].std(dim=0).mean()
    assert spread > 0.01  # and not one and the same for all noise


# --- what others get wrong --------------------------------------------------------------------------------------------
def watched(table: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Any, ...]:
    """(heads, omega, student, prior) of the last generator training of a run, and the run's outcome."""
    seen: list[tuple[Any, ...]] = []
    original = fedgen.train_generator

    def spy(
        generator: Any, adam: Any, loss: Any, heads: Any, omega: Any, student: Any, prior: Any, **options: Any
    ) -> None:
        seen.append((heads, omega, student, prior))
        original(generator, adam, loss, heads, omega, student, prior, **options)

    monkeypatch.setattr(fedgen, "train_generator", spy)
    outcome = run(job_of(table, **changes), folder)
    return (*seen[-1], outcome)


def trained_by(client: int, round_: int, federation: Federation, server: dict[str, Tensor]) -> Tensor:
    """What FedAvg's client makes of the server's model, `[d]`."""
    algorithm: Any = federation.algorithm
    ctx = Context(
        federation.env, client, round_, "train", partial(federation.samples, client), 1.0, federation.job.local
    )
    algorithm.client({}, algorithm.download(server, round_), ctx)
    return ctx.model.parameters.detach().clone()


def test_teachers_are_the_clients_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the server's: an implementation that loads every client into one object and asks another learns nothing."""
    heads, *_ = watched(FEDGEN, tmp_path, monkeypatch, rounds=1)
    job = job_of(FEDGEN, rounds=1)
    federation = Federation.build(job, InProcess.alone())
    server = job.algorithm.make().server_init(federation.env)
    clients = federation.roster.sample(1)
    parts = Parts.of(federation.env.model().module, federation.env.model().layout)
    expected = [parts.head(trained_by(client, 1, federation, server)) for client in clients]
    weights, biases = parts.linear(torch.stack(expected))
    torch.testing.assert_close(heads.weights, weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(heads.biases, biases, rtol=1e-6, atol=1e-6)
    assert len(weights) == PARTICIPANTS and (weights[0] - weights[1]).norm() > 1e-3
    latent = torch.randn(4, weights.shape[2])
    for k in range(PARTICIPANTS):  # one batched forward is the loop
        torch.testing.assert_close(heads(latent)[k], nn.functional.linear(latent, weights[k], biases[k]))


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_weights_follow_the_label_counts(smoothing: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They sum to 1 for every label, and are 0 where a client has none of it and nothing is smoothed."""
    table = FEDGEN | {"smoothing": smoothing, "counts": "held"}
    _, omega, _, _, _ = watched(table, tmp_path, monkeypatch, rounds=1)
    federation = Federation.build(job_of(table), InProcess.alone())
    held = torch.from_numpy(federation.histogram[list(federation.roster.sample(1))]).double() + smoothing
    torch.testing.assert_close(omega.double(), held / held.sum(dim=0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(omega.sum(dim=0), torch.ones(3))
    if smoothing == 0.0:
        assert (held == 0).any() and torch.equal(omega == 0, held == 0)


def test_labels_seen_are_those_of_the_rounds_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 batches of 8: every client has seen 32 labels or fewer, whatever it holds, and none that it does not hold."""
    table = FEDGEN | {"smoothing": 0.0, "labels": "prior"}
    _, omega, _, prior, _ = watched(table, tmp_path / "seen", monkeypatch, rounds=1, local=STEPS)
    _, held, _, prior_held, outcome = watched(table | {"counts": "held"}, tmp_path, monkeypatch, rounds=1, local=STEPS)
    assert not torch.equal(prior, prior_held)
    assert bool(((omega > 0) <= (held > 0)).all())
    torch.testing.assert_close(label_prior(outcome.server["label_counts"][None]), prior_held)
    assert float(prior_held.sum()) == pytest.approx(1.0)


def test_uniform_labels_are_those_that_were_ever_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients draw from all labels that were uploaded so far, the server from those of the round's clients."""
    one_class = {"data": DATA | {"partition": {"name": "labels", "labels_per_client": 1}}, "participation": 1}
    _, _, _, prior, outcome = watched(FEDGEN, tmp_path, monkeypatch, rounds=4, **one_class)
    assert sorted(prior.tolist()) == [0.0, 0.0, 1.0]
    known = label_prior(outcome.server["label_counts"][None])
    assert 2 <= int((known > 0).sum()) <= 3 and float(known.sum()) == pytest.approx(1.0)
    assert len({float(p) for p in known if p > 0}) == 1


def test_clients_smaller_than_a_batch_take_part(tmp_path: Path) -> None:
    local = {"steps": 3, "batch_size": 200, "lr": 0.1}
    outcome = run(job_of(FEDGEN, local=local), tmp_path)
    assert all(row["absent"] == [] for row in outcome.rows)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(BadInput, match="cannot be split into a feature extractor and a head"):
        Federation.build(job_of(FEDGEN, model={"name": "tests.unit.test_fedgen:headless"}), InProcess.alone())


def headless(spec: Any) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, spec.classes))


# --- sharing heads alone ----------------------------------------------------------------------------------------------
HEAD = FEDGEN | {"share": "head"}


def test_sharing_heads_moves_nothing_else(tmp_path: Path) -> None:
    """The authors' code aggregates everything, and downloads nothing."""
    outcome = run(job_of(HEAD), tmp_path, 3)
    kinds = {kind for _, kind in outcome.logical()}
    generated = {"down.generator", "down.generator_statistics", "down.label_counts"}
    assert kinds == {"down.head", "up.head_update", "up.label_counts", "up.weight"} | generated
    assert "model" not in outcome.server and "buffers" not in outcome.server
    bodies = [record["state"]["body"] for record in outcome.clients.values()]
    assert len(bodies) > 2
    assert all(not torch.equal(one, other) for i, one in enumerate(bodies) for other in bodies[:i])


def test_a_client_goes_on_from_its_own_body_and_the_servers_head(tmp_path: Path) -> None:
    """Client states are those of FedAvg's training from (own body, own statistics, downloaded head), twice."""
    table = HEAD | OFF
    outcome = run(job_of(table, rounds=2, participation=1.0), tmp_path)
    federation = Federation.build(job_of(table, rounds=2, participation=1.0), InProcess.alone())
    algorithm: Any = federation.algorithm
    parts, env = algorithm.parts(federation.env), federation.env
    one = run(job_of(table, rounds=1, participation=1.0), tmp_path / "one")
    head = env.initial()[0]
    for client in range(CLIENTS):
        body = {"body": parts.body(head), "buffers": env.initial()[1]}
        for round_, sent in ((1, parts.head(head)), (2, one.server["head"])):
            ctx = Context(env, client, round_, "train", partial(federation.samples, client), 1.0, federation.job.local)
            ctx.model.load(parts.join(body["body"], sent), body["buffers"])
            local_training(ctx)
            model = ctx.model.parameters.detach().clone()
            body = {"body": parts.body(model), "buffers": ctx.model.buffers.clone()}
        kept = outcome.clients[client]["state"]
        for name, value in body.items():
            assert torch.equal(kept[name], value), name


def test_own_tests_use_the_own_body_and_the_head_that_was_sent(tmp_path: Path) -> None:
    outcome = run(job_of(HEAD, evaluate={"own": True}), tmp_path, 2)
    assert all(0 <= row["accuracy_own"] <= 1 and 0 <= row["accuracy"] <= 1 for row in outcome.rows)
    algorithm = FedGen(share="head")
    env = Federation.build(job_of(HEAD), InProcess.alone()).env
    parts = algorithm.parts(env)
    state = {"body": torch.full_like(parts.body(env.initial()[0]), 2.0), "head": parts.head(env.initial()[0])}
    sent = torch.full_like(state["head"], 3.0)
    model, _ = algorithm.received(state, {"head": sent}, env, 0)
    assert torch.equal(parts.head(model), sent) and torch.equal(parts.body(model), state["body"])
    assert torch.equal(parts.head(algorithm.client_predictor(state, env, 0)[0]), state["head"])


# --- payload ----------------------------------------------------------------------------------------------------------
def payload(model: dict[str, Any], shape: list[int], classes: int, **algorithm: Any) -> tuple[int, int, int]:
    """Bytes down in round 1, down in later ones, and up, of one client."""
    data = DATA | {"input_shape": shape, "classes": classes}
    job = job_of({"name": "fedgen"} | algorithm, data=data, model=model | {"buffers": "local"})
    env = Federation.build(job, InProcess.alone()).env
    (phase,) = job.algorithm.make().phases(env)

    def size(fields: dict[str, Field]) -> int:
        return sum(torch.Size(field.shape).numel() * field.dtype.itemsize for field in fields.values())  # type: ignore[arg-type]

    return size(dict(phase.down(1))), size(dict(phase.down(2))), size(dict(phase.up(1)))


NET = {"name": "fedgen_net"}
CELEBA = {"name": "fedgen_net", "channels": [16, 32, 64], "pool": True}


@pytest.mark.parametrize(
    ("model", "shape", "classes", "hidden", "classifier", "generator", "down", "up"),
    [
        (NET, [1, 28, 28], 10, 256, 105_736, 81_032, 186_808, 105_776),
        (NET, [1, 28, 28], 26, 256, 107_848, 97_416, 205_368, 107_952),
        (CELEBA, [3, 84, 84], 2, 128, 103_816, 36_488, 140_312, 103_824),
    ],
    ids=["mnist", "emnist", "celeba"],
)
def test_the_papers_payload(
    model: Any, shape: Any, classes: int, hidden: int, classifier: int, generator: int, down: int, up: int
) -> None:
    """Model, generator with its running statistics, and a float a label down; model and an int32 a label up.

    Less 8 bytes of the generator's batch counter, an int64 that means nothing to a receiver and is not sent here.
    """
    assert down == classifier + generator + 4 * classes and up == classifier + 4 * classes
    assert payload(model, shape, classes, hidden=hidden) == (classifier, down - 8, up)


def test_the_papers_payload_of_heads_alone() -> None:
    """MNIST: 1,320 head, 81,032 - 8 generator, 40 labels; up 1,320 and 40."""
    assert payload(NET, [1, 28, 28], 10, share="head") == (1_320, 82_392 - 8, 1_360)


# --- the parts of a classifier ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
def test_parts_of_a_classifier(bias: bool) -> None:
    module = Classifier(nn.Linear(2, 3), 3, 4, bias)
    model = FlatModel(module)
    parts = Parts.of(module, model.layout)
    flat = model.parameters.detach()
    head = [module.head.weight.flatten()] + ([module.head.bias] if bias else [])
    assert torch.equal(parts.head(flat), torch.cat(head)) and parts.head_layout.size == 12 + 4 * bias
    assert torch.equal(parts.join(parts.body(flat), parts.head(flat)), flat)
    assert parts.body_layout.names == ("body.weight", "body.bias")
    weights, biases = parts.linear(torch.stack([parts.head(flat), 2 * parts.head(flat)]))
    assert torch.equal(weights[1], 2 * module.head.weight)
    assert torch.equal(biases[0], module.head.bias if bias else torch.zeros(4))


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.rest = nn.Linear(1, 3)

    def features(self, x: Tensor) -> Tensor:
        return self.rest(x)


def test_a_head_may_stand_anywhere() -> None:
    model = FlatModel(HeadFirst())
    parts, flat = Parts.of(model.module, model.layout), torch.arange(14.0)
    assert parts.head(flat).tolist() == list(range(8)) and parts.body(flat).tolist() == list(range(8, 14))
    assert torch.equal(parts.join(parts.body(flat), parts.head(flat)), flat)


# --- codecs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("table", [FEDGEN, HEAD], ids=["all", "head"])
def test_it_works_with_a_lossy_codec(table: dict[str, Any], tmp_path: Path) -> None:
    """Half the bytes, and close to the exact run; the same bits on three ranks."""
    half = run(job_of(table, codec="half"), tmp_path / "1")
    assert_same_bits(run(job_of(table, codec="half"), tmp_path / "3", 3).tensors(), half.tensors())
    exact: Outcome = run(job_of(table), tmp_path / "exact")
    name = "model" if table is FEDGEN else "head"
    assert 0 < (half.server[name] - exact.server[name]).norm() < 0.05 * exact.server[name].norm()


# --- speed ------------------------------------------------------------------------------------------------------------
def test_the_server_does_not_loop_over_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batched forward calls as many operations for 20 clients as for 5; `benchmarks/fedgen_server.py` times it."""
    latent, calls = torch.zeros(4, 3), []
    original = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *given: calls.append(given) or original(*given))
    for k in (5, 20):
        assert Heads(torch.zeros(k, 2, 3), torch.zeros(k, 2))(latent).shape == (k, 4, 2)
    assert len(calls) == 2
