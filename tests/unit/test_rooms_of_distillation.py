"""What algorithms beyond averaging ask of the house: a public set, models of the clients' own, ensembles, own tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from mpifed.algorithms.base import Absent, Algorithm, ClientContext, Ensemble, Env, Field, Mean, Phase, Reply, Uploads
from mpifed.algorithms.fedavg import FedAvg
from mpifed.comm.inprocess import InProcess
from mpifed.errors import BadInput
from mpifed.federation.federation import Federation
from mpifed.learning.evaluate import evaluate
from mpifed.learning.local import Adam
from mpifed.models import initialise
from mpifed.models.flat import FlatModel
from mpifed.types import Payload, State
from tests.algorithm_table import CLASSES, CLIENTS, ROUNDS, SHAPE, assert_same_bits, job_of, run

HERE = "tests.unit.test_rooms_of_distillation"
SYNTHETIC: dict[str, Any] = {"name": "synthetic", "samples": 120, "test_samples": 60, "input_shape": list(SHAPE)}
PARTITION = {"name": "dirichlet", "alpha": 0.5, "min_size": 10}


def data(**keys: Any) -> dict[str, Any]:
    """The table's federation, `keys` added to `[data]`."""
    return SYNTHETIC | {"classes": CLASSES, "partition": PARTITION} | keys


def build(algorithm: str = "fedavg", **changes: Any) -> Federation:
    return Federation.build(job_of({"name": algorithm}, **changes), InProcess.alone())


# --- a public data set ------------------------------------------------------------------------------------------------
def test_a_public_set_is_the_same_for_everybody_and_standardised_by_itself() -> None:
    public = SYNTHETIC | {"classes": 4, "seed": 5}
    env = build(data=data(public=public)).env
    assert env.public is not None
    assert (len(env.public), env.public.classes, env.spec.classes) == (120, 4, CLASSES)
    assert env.public.labels.dtype == torch.int64 and int(env.public.labels.max()) < 4
    x = env.public.x(torch.tensor([3, 1]))
    assert (x.dtype, tuple(x.shape)) == (torch.float32, (2, *SHAPE))
    assert torch.equal(x[1], env.public.x(torch.tensor([1]))[0])


def test_private_classes_come_after_public_ones() -> None:
    """Public labels 0..3, private ones 4..6; a model puts out seven logits; who holds what is as without."""
    public = SYNTHETIC | {"classes": 4, "seed": 5}
    union = build(data=data(public=public, public_classes="union"))
    plain = build(data=data())
    assert union.env.spec.classes == 4 + CLASSES
    assert union.partition.sha256 == plain.partition.sha256
    assert torch.equal(union.samples(0)[1], plain.samples(0)[1] + 4)
    assert torch.equal(union.test_set[1], plain.test_set[1] + 4)
    assert union.histogram[:, :4].sum() == 0 and (union.histogram[:, 4:] == plain.histogram).all()
    assert union.env.model()(torch.zeros(2, *SHAPE)).shape == (2, 4 + CLASSES)


def test_some_of_the_public_samples() -> None:
    """Drawn from the job's seed, none twice."""
    public = SYNTHETIC | {"classes": 4}
    some = build(data=data(public=public, public_samples=50)).env.public
    assert some is not None and len(some) == 50
    assert len(torch.unique(some.x(torch.arange(50)), dim=0)) == 50
    again = build(data=data(public=public, public_samples=50)).env.public
    assert again is not None and torch.equal(again.labels, some.labels)


def test_a_part_of_the_private_samples_may_be_public() -> None:
    """A quarter of 120: 30 public, 90 private; together they are all samples, once each."""
    federation = build(data=data(public_held_out=0.25, partition={"name": "iid"}))
    assert federation.env.public is not None
    public = federation.env.public.x(torch.arange(30))
    private = torch.cat([federation.samples(client)[0] for client in range(CLIENTS)])
    assert (len(federation.env.public), len(private)) == (30, 90)
    whole = build(data=data(partition={"name": "iid"}))
    everything = torch.cat([whole.samples(client)[0] for client in range(CLIENTS)])
    ours, theirs = (torch.unique(x, dim=0) for x in (torch.cat([public, private]), everything))
    assert torch.equal(ours, theirs) and len(ours) == 120
    assert torch.equal(federation.test_set[0], whole.test_set[0])
    labels = torch.cat([federation.env.public.labels, *(federation.samples(c)[1] for c in range(CLIENTS))])
    assert torch.equal(labels.bincount(), torch.cat([whole.samples(c)[1] for c in range(CLIENTS)]).bincount())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"public_held_out": 0.001}, r"data.public_held_out: 0.001 of 120 samples are 0"),
        ({"public": SYNTHETIC | {"input_shape": [5]}}, r"data.public.name: 'synthetic' has samples of shape \(5,\)"),
        ({"public": SYNTHETIC, "public_samples": 121}, r"data.public_samples: 'synthetic' has only 120 samples"),
    ],
)
def test_a_public_set_that_does_not_fit(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build(data=data(**keys))


def test_labels_that_are_learnt_need_an_output() -> None:
    """Seven public classes beside three private ones: their labels are refused, the samples alone are not."""
    keys = {"public": SYNTHETIC | {"classes": 7}}
    with pytest.raises(BadInput, match=r"transfer.public_epochs: the public set has 7 classes and the private one 3"):
        build("local", data=data(**keys), transfer={"public_epochs": 1})
    for allowed in ({"transfer": {"public_epochs": 0}}, {"data": data(**keys, public_classes="union")}):
        build("local", **({"data": data(**keys), "transfer": {"public_epochs": 1}} | allowed))


@dataclass(frozen=True)
class NeedsPublic(FedAvg):
    needs_public: ClassVar[bool] = True


def test_an_algorithm_that_needs_a_public_set_says_so() -> None:
    with pytest.raises(BadInput, match=r"data.public: .* needs a public data set"):
        job_of({"name": f"{HERE}:NeedsPublic"})


# --- models of the clients' own ---------------------------------------------------------------------------------------
OWN = [{"name": "mlp", "hidden": [5]}, {"name": "mlp", "hidden": [4, 3]}]


def test_client_models_are_dealt_in_turn_and_differ_from_the_shared_one() -> None:
    env = build("local", client_models=OWN, model={"name": "mlp", "hidden": [5]}).env
    assert env.model(0) is env.model(2) is env.model(4)
    assert env.model(0) is not env.model(1)
    assert env.model() is not env.model(0)  # the same architecture, and still two instances
    assert env.model(1).layout.names[0] == "body.linear1.weight" and env.model(1).layout.shapes[0] == (4, 4)
    assert not torch.equal(env.initial()[0], env.initial(0)[0])
    without = build(model={"name": "mlp", "hidden": [5]}).env
    assert without.model() is without.model(3)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedgen", "fedftg", "feddistill_plus"])
def test_one_model_for_all_is_not_made_of_clients_own_models(name: str) -> None:
    with pytest.raises(BadInput, match=f"^client_models: {name} makes one model"):
        job_of({"name": name}, client_models=OWN)


def test_unfit_client_models_are_found_before_round_1() -> None:
    with pytest.raises(BadInput, match="model.name: 'cnn'"):
        build("local", client_models=[OWN[0], {"name": "cnn"}])


def test_every_client_trains_its_own_architecture(tmp_path: Path) -> None:
    job = job_of({"name": "local"}, client_models=OWN, participation=1.0)
    alone = run(job, tmp_path / "1")
    sizes = {client: state["state"]["model"].numel() for client, state in alone.clients.items()}
    assert [sizes[client] for client in range(CLIENTS)] == [43, 47, 43, 47, 43]
    assert_same_bits(run(job, tmp_path / "3", 3).tensors(), alone.tensors())


def test_auxiliary_models_depend_on_seed_and_name_alone() -> None:
    first, second = build().env, build().env
    generator = first.auxiliary("generator", lambda: nn.Linear(2, 3))
    assert first.auxiliary("generator", lambda: nn.Linear(9, 9)) is generator
    assert torch.equal(second.auxiliary("generator", lambda: nn.Linear(2, 3)).parameters, generator.parameters)
    assert not torch.equal(second.auxiliary("critic", lambda: nn.Linear(2, 3)).parameters, generator.parameters)
    assert not torch.equal(
        build(seed=1).env.auxiliary("generator", lambda: nn.Linear(2, 3)).parameters, generator.parameters
    )


# --- what is tested ---------------------------------------------------------------------------------------------------
def test_an_ensemble_predicts_by_the_mean_of_its_logits() -> None:
    """Logits of a bias alone: (2, 0) and (0, 4) have the mean (1, 2), so class 1 though the first says 0.

    The loss of label 1 is log(1 + e^(1 - 2)) = 0.31326.
    """
    module = initialise(lambda: nn.Linear(1, 2), 0)
    model = FlatModel(module)
    members = tuple((torch.tensor([0.0, 0.0, *bias]), torch.empty(0)) for bias in ((2.0, 0.0), (0.0, 4.0)))
    tested = evaluate(model, torch.zeros(3, 1), torch.tensor([1, 1, 0]), 2, members=members)
    assert (tested.correct, tested.examples) == (2, 3)
    assert tested.loss == pytest.approx((0.3132617 * 2 + 1.3132617) / 3)
    alone = evaluate(model, torch.zeros(3, 1), torch.tensor([1, 1, 0]), 2, members=members[:1])
    assert alone.correct == 1


@dataclass(frozen=True)
class Committee(FedAvg):
    """Predicts with the initial model twice and the server's once."""

    def predictor(self, server: State, env: Env) -> Ensemble:
        return Ensemble((env.initial(), env.initial(), (server["model"], server["buffers"])))


def test_an_algorithm_may_predict_with_an_ensemble(tmp_path: Path) -> None:
    rows = run(job_of({"name": f"{HERE}:Committee"}), tmp_path).rows
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    assert (
        len({row["loss"] for row in rows} - {row["loss"] for row in run(job_of({"name": "fedavg"}), tmp_path).rows})
        == 3
    )


@dataclass(frozen=True)
class Both(FedAvg):
    """FedAvg that tests what each client trained, as well."""

    evaluates: ClassVar[Literal["server", "clients", "both"]] = "both"
    stateful: ClassVar[bool] = True

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        state, reply = super().client(state, down, ctx)
        own = {"model": ctx.model.parameters.detach().clone(), "buffers": ctx.model.buffers.clone()}
        ctx.log("tested_by_itself", ctx.evaluate(own["model"], own["buffers"])["accuracy"])
        return own, reply

    def client_predictor(self, state: State, env: Env, client: int) -> tuple[Tensor, Tensor]:
        return state["model"], state["buffers"]


def test_server_and_clients_are_both_tested(tmp_path: Path) -> None:
    both, plain = (
        run(job_of(table), tmp_path / table["name"][-3:]) for table in ({"name": f"{HERE}:Both"}, {"name": "fedavg"})
    )
    for row, expected in zip(both.rows, plain.rows, strict=True):
        assert (row["server_accuracy"], row["server_loss"]) == (expected["accuracy"], expected["loss"])
        assert row["accuracy"] == row["tested_by_itself"]
        assert row["accuracy_min"] <= row["accuracy"] <= row["accuracy_max"]
    assert_same_bits(run(job_of({"name": f"{HERE}:Both"}), tmp_path / "3", 3).tensors(), both.tensors())


@pytest.mark.parametrize("buffers", ["average", "local", "both"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_own_tests_are_of_what_each_client_was_sent(ranks: int, buffers: str, tmp_path: Path) -> None:
    """Of a round's download, so of the model after the round before; correct over samples, of all clients, whoever
    took part. With shared running statistics the samples of a client's labels are tested with the very model that the
    server tested: then the number can be computed from it."""
    model = {"name": "tests.algorithm_table:model", "buffers": buffers}
    job = job_of({"name": "fedavg"}, evaluate={"own": True}, model=model)
    outcome = run(job, tmp_path, ranks)
    assert all(0 <= row["accuracy_own"] <= 1 for row in outcome.rows)
    if buffers != "average":
        assert [row["accuracy_own"] for row in outcome.rows] == [
            row["accuracy_own"] for row in run(job, tmp_path / "again", 5).rows
        ]
        return
    federation = Federation.build(job, InProcess.alone())
    x, y = federation.test_set
    sent = {1: federation.env.initial()}
    for t in (1, 2):
        server = run(job_of({"name": "fedavg"}, rounds=t), tmp_path / str(t)).server
        sent[t + 1] = server["model"], server["buffers"]
    for row in outcome.rows:
        correct = samples = 0
        for held in federation.histogram > 0:
            mine = torch.from_numpy(held)[y]
            tested = evaluate(federation.env.model(), x[mine], y[mine], 1000, members=[sent[row["round"]]])
            correct, samples = correct + tested.correct, samples + tested.examples
        assert row["accuracy_own"] == correct / samples


def test_own_tests_cost_no_bytes(tmp_path: Path) -> None:
    plain = run(job_of({"name": "fedavg"}), tmp_path / "plain", 3)
    own = run(job_of({"name": "fedavg"}, evaluate={"own": True}), tmp_path / "own", 3)
    assert own.logical() == plain.logical()
    assert_same_bits(own.tensors(), plain.tensors())


# --- phases of some rounds --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class OnlyFirst(Algorithm):
    """A phase `ask` that takes place in round 1 alone, before `train`."""

    def server_init(self, env: Env) -> State:
        return {"asked": torch.zeros(()), "trained": torch.zeros(())}

    def phases(self, env: Env) -> tuple[Phase, ...]:
        def fields(t: int) -> Mapping[str, Field]:
            return {"one": Field((), reduce=Mean("uniform"))}

        def answer(state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
            ctx.log("train_loss", 1.0)
            return state, Reply({"one": torch.ones(())})

        def added(name: str) -> Any:
            def server(server: State, uploads: Uploads, t: int) -> State:
                return server | {name: server[name] + uploads.mean("one")}

            return server

        def nothing(t: int) -> Mapping[str, Field]:
            return {}

        ask = Phase("ask", nothing, fields, lambda s, t: {}, answer, added("asked"), rounds=lambda t: t == 1)
        return ask, Phase("train", nothing, fields, lambda s, t: {}, answer, added("trained"))

    def predictor(self, server: State, env: Env) -> tuple[Tensor, Tensor]:
        return env.initial()


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_phase_takes_place_in_its_rounds_alone(ranks: int, tmp_path: Path) -> None:
    outcome = run(job_of({"name": f"{HERE}:OnlyFirst"}), tmp_path, ranks)
    assert (float(outcome.server["asked"]), float(outcome.server["trained"])) == (1.0, ROUNDS)
    assert [outcome.logical()[t, "up.one"] for t in range(1, ROUNDS + 1)] == [24, 12, 12]


# --- optimisers that go on --------------------------------------------------------------------------------------------
def test_adam_goes_on_where_it_was() -> None:
    """Five steps at once, and two and three with the moments carried over."""
    settings = job_of({"name": "fedavg"}).local
    gradients = [torch.randn(3, generator=torch.Generator().manual_seed(step)) for step in range(5)]

    def steps(values: Tensor, some: list[Tensor], state: State | None) -> State:
        adam = Adam([values], settings, 0.1)
        if state is not None:
            adam.restore(state)
        for gradient in some:
            adam.step([gradient])
        return adam.state()

    whole, parts = torch.zeros(3), torch.zeros(3)
    end = steps(whole, gradients, None)
    again = steps(parts, gradients[2:], steps(parts, gradients[:2], None))
    assert torch.equal(whole, parts)
    assert_same_bits(again, end)
    assert float(end["steps"]) == 5
