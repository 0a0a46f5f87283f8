"""FedMD: rounds worked out by hand, its identities, and what public re-implementations of it get wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpifed.algorithms.base import Reply
from mpifed.algorithms.fedmd import FedMD, in_proportion
from mpifed.comm.inprocess import InProcess
from mpifed.engine import Engine
from mpifed.federation.federation import Federation
from mpifed.job import Transfer
from mpifed.learning.local import Adam, Sgd, adam_optimizer
from mpifed.learning.scores import digest, scores
from mpifed.learning.transfer import Stage, to_convergence
from mpifed.models import initialise
from mpifed.models.classifier import Classifier
from mpifed.models.flat import FlatModel
from mpifed.types import Payload, State
from tests.algorithm_table import (
    ADAM,
    CLASSES,
    CLIENTS,
    DATA,
    PUBLIC,
    ROUNDS,
    Outcome,
    assert_same_bits,
    job_of,
    run,
)
from tests.toy import Prior, ToyEnv, close, context

SMALL: dict[str, Any] = {"name": "fedmd", "subset_size": 20, "digest_batch_size": 8}


class Numbers:
    """A public set whose sample i is the number i, of class i mod `classes`."""

    def __init__(self, samples: int, classes: int = 2) -> None:
        self.labels = torch.arange(samples) % classes
        self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def x(self, indices: Tensor) -> Tensor:
        assert indices.dtype == torch.int64
        return indices.float().view(-1, 1)


def env_of(module: nn.Module, public: int = 8, clients: int = 2) -> Any:
    env = ToyEnv(module, clients)
    env.public = Numbers(public)  # type: ignore[assignment]
    return env


def uploads(means: Payload) -> Any:
    return SimpleNamespace(mean=lambda name: means[name])


# --- a round by hand --------------------------------------------------------------------------------------------------
@pytest.mark.golden
def test_a_round_by_hand() -> None:
    """Two clients whose logits are their biases: (3, 0, 0) and (0, 1, 0), whatever the sample.

    Consensus of each sample: (1.5, 0.5, 0). L1 over 3 classes: client 0's gradient is (1, -1, 0)/3 (sign, and 0 where
    equal). Adam's first step is lr = 0.1 against the sign: (2.9, 0.1, 0). Both batches of the epoch: the second step
    has the same gradient, so m/sqrt(v) corrected is the sign again: (2.8, 0.2, 0).
    Revisit, one SGD step of lr 0.3 on a sample of label 2: softmax p of (2.8, 0.2, 0) is (e^2.8, e^0.2, 1) / S with
    S = 16.44465 + 1.22140 + 1 = 18.66605; b = (2.8 - 0.3 * 0.88100, 0.2 - 0.3 * 0.06543, 0.3 * (1 - 0.05357)).
    """
    env = env_of(Prior([3.0, 0.0, 0.0]), public=4)
    algorithm = FedMD(subset_size=4, digest_batch_size=2, digest_lr=0.1)
    score, last = algorithm.phases(env)
    server = algorithm.server_init(env)
    down = score.download(server, 1)
    assert sorted(down["indices"].tolist()) == [0, 1, 2, 3] and down["indices"].dtype == torch.int32

    ctx = context(env, torch.zeros(1, 1), torch.tensor([2]), lr=0.3)
    states: list[State] = [
        {"model": torch.tensor(b), "buffers": torch.empty(0)} for b in ([3.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    ]
    logits = []
    for state in states:
        kept, reply = score.client(state, down, ctx)
        assert isinstance(reply, Reply) and reply.weight == 1.0
        assert torch.equal(kept["model"], state["model"])
        logits.append(reply.upload["logits"])
    assert logits[1].tolist() == [[0.0, 1.0, 0.0]] * 4
    server = score.server(server, uploads({"logits": torch.stack(logits).mean(dim=0)}), 1)
    down = last.download(server, 1)
    assert down["consensus"].tolist() == [[1.5, 0.5, 0.0]] * 4

    state, reply = last.client(states[0], down, ctx)
    assert isinstance(reply, Reply) and reply.upload == {}
    close(state["model"], [2.8 - 0.3 * 0.88100, 0.2 - 0.3 * 0.06543, 0.3 * (1 - 0.05357)], 1e-4)
    # of (|3 - 1.5| + |0 - 0.5|) / 3 = 2/3 and (1.4 + 0.4) / 3 = 0.6 the mean
    assert ctx.logged["digest_loss"] == pytest.approx(19 / 30)
    assert float(state["digest"]["steps"]) == 2


@pytest.mark.golden
@pytest.mark.parametrize(
    ("loss", "temperature", "expected"),
    [("l1", 1.0, 2.0), ("mse", 1.0, 14 / 3), ("kl", 1.0, 0.26621), ("kl", 2.0, 0.31368)],
)
def test_losses_of_the_digest(loss: str, temperature: float, expected: float) -> None:
    """Scores (0, 0, 0), target (1, 2, 3).

    L1: (1 + 2 + 3)/3; MSE: (1 + 4 + 9)/3. KL(p || 1/3) = ln 3 - H(p): at T = 1, p = (0.09003, 0.24473, 0.66524) and
    H = 0.83240, so 1.09861 - 0.83240 = 0.26621; at T = 2, p = (0.18632, 0.30720, 0.50648) and H = 1.02019, so
    4 * (1.09861 - 1.02019) = 0.31368.
    """
    env = env_of(Prior([0.0, 0.0, 0.0]), public=3)
    ctx = context(env, torch.zeros(1, 1), torch.tensor([0]), lr=1e-9)
    algorithm = FedMD(digest_loss=loss, temperature=temperature, digest_lr=1e-9)  # type: ignore[arg-type]
    down = {"indices": torch.arange(3, dtype=torch.int32), "consensus": torch.tensor([[1.0, 2.0, 3.0]]).expand(3, -1)}
    algorithm.phases(env)[1].client({"model": torch.zeros(3), "buffers": torch.empty(0)}, down, ctx)
    assert ctx.logged["digest_loss"] == pytest.approx(expected, abs=2e-5)


# --- what others get wrong --------------------------------------------------------------------------------------------
Seen = dict[tuple[int, str, int], tuple[State, Payload]]


def downloads_of(job: Any, folder: Path) -> Seen:
    """State and download that each client was given, by round, phase and client."""
    seen: Seen = {}

    def prepare(engine: Engine) -> None:
        def watched(phase: Any) -> Any:
            def client(state: State, down: Payload, ctx: Any) -> Any:
                seen[ctx.round, phase.name, ctx.id] = (dict(state), {name: t.clone() for name, t in down.items()})
                return phase.client(state, down, ctx)

            return dataclasses.replace(phase, client=client)

        engine.phases = tuple(map(watched, engine.phases))

    run(job, folder, prepare=prepare)
    return seen


def test_public_samples_are_fresh_every_round_and_targets_belong_to_them(tmp_path: Path) -> None:
    """The consensus of a round is, sample by sample, the mean of what the models that came into the round say.

    In evaluation mode, with each client's own running statistics, and of this round's models and samples: not of the
    first round's (FL-bench) and not of the round before (a consensus one round late).
    """
    job = job_of(SMALL, data=PUBLIC, participation=1.0)
    seen = downloads_of(job, tmp_path)
    env = Federation.build(job, InProcess.alone()).env
    assert env.public is not None
    subsets = []
    for t in range(1, ROUNDS + 1):
        indices = seen[t, "score", 0][1]["indices"]
        assert len(indices.unique()) == 20
        subsets.append(set(indices.tolist()))
        total = torch.zeros(20, CLASSES, dtype=torch.float64)
        for client in range(CLIENTS):
            state, down = seen[t, "digest", client]
            assert torch.equal(down["indices"], indices)
            model = env.model(client)
            model.load(state["model"], state["buffers"])
            model.eval()
            with torch.no_grad():
                for row, index in enumerate(indices):
                    total[row] += model(env.public.x(index.view(1).long()))[0]
        torch.testing.assert_close(down["consensus"].double(), total / CLIENTS, rtol=1e-5, atol=1e-6)
    assert len(set(map(frozenset, subsets))) == ROUNDS


class Recorder(nn.Module):
    """Logits w * x for one class, and notes in which mode it was given which inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.0]))
        self.given: list[tuple[bool, list[float]]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append((self.training, x[:, 0].tolist()))
        return x * self.w


def test_inputs_and_targets_are_shuffled_together_and_the_last_one_is_left_out() -> None:
    """Sample i has target 2 i, so w = 2 fits all: the loss is zero at it only if no pair is torn.

    Nine samples in batches of four, two epochs: 4, 4 (the ninth would be a batch of one), in two orders.
    """
    module = Recorder()
    env = env_of(module, public=20)
    indices = torch.tensor([3, 19, 4, 8, 1, 15, 0, 7, 12])
    ctx = context(env, torch.zeros(1, 1))
    ctx.model.load(torch.tensor([2.0]))
    optimizer = adam_optimizer(ctx.model, ctx.local, 0.1)
    digest(ctx, indices, 2.0 * indices.float().view(-1, 1), torch.nn.functional.l1_loss, 2, 4, optimizer)
    assert ctx.logged["digest_loss"] == 0.0
    assert [(mode, len(x)) for mode, x in module.given] == [(True, 4)] * 4
    first, second = ([*module.given[i][1], *module.given[i + 1][1]] for i in (0, 2))
    assert set(first) < set(indices.tolist()) and len(set(first)) == 8 and first != second


def test_scores_are_taken_in_evaluation_mode_in_batches() -> None:
    module = Recorder()
    model = FlatModel(module)
    model.load(torch.tensor([2.0]))
    assert scores(model, Numbers(9).x, torch.tensor([5, 3, 8]), batch_size=2).tolist() == [[10.0], [6.0], [16.0]]
    assert module.given == [(False, [5.0, 3.0]), (False, [8.0])]


def test_a_client_of_three_samples_in_batches_of_five(tmp_path: Path) -> None:
    """Of 15 samples each of 5 clients has 3; a client with one more than a batch loses that one, not the round."""
    data = PUBLIC | {"samples": 15, "partition": {"name": "iid"}}
    transfer = {"public_epochs": 1, "private_epochs": 3, "private_validation": 0.3}
    for batch_size in (5, 2):
        local = ADAM | {"batch_size": batch_size}
        job = job_of(SMALL, data=data, participation=1.0, local=local, transfer=transfer)
        assert all(row["absent"] == [] for row in run(job, tmp_path / str(batch_size)).rows)


OWN = [{"name": "tests.algorithm_table:model"}, {"name": "mlp", "hidden": [5, 4]}]


def test_clients_of_different_architectures_teach_each_other(tmp_path: Path) -> None:
    """The same bits on any number of ranks, and one model of each stays what it is."""
    job = job_of(SMALL, data=PUBLIC, participation=1.0, client_models=OWN, transfer={"private_epochs": 2})
    alone = run(job, tmp_path / "1")
    sizes = [alone.clients[client]["state"]["model"].numel() for client in range(CLIENTS)]
    assert sizes == [30, 64, 30, 64, 30]
    assert all(record["state"]["digest"]["mean"].numel() == sizes[c] for c, record in alone.clients.items())
    assert_same_bits(run(job, tmp_path / "3", 3).tensors(), alone.tensors())


def test_running_statistics_stay_with_the_client(tmp_path: Path) -> None:
    """Batch normalisation moves in digest and revisit, and nothing but scores crosses."""
    outcome = run(job_of(SMALL, data=PUBLIC, participation=1.0), tmp_path)
    statistics = [record["state"]["buffers"] for record in outcome.clients.values()]
    assert not torch.equal(statistics[0], statistics[1])
    assert {kind for _, kind in outcome.logical()} == {"down.indices", "up.logits", "down.consensus"}


# --- weights, subsets -------------------------------------------------------------------------------------------------
def test_consensus_weights_are_dealt_in_turn() -> None:
    env = env_of(Prior([1.0, 0.0]), clients=3)
    algorithm = FedMD(subset_size=2, weights=(1.0, 0.25))
    phase = algorithm.phases(env)[0]
    state = {"model": torch.zeros(2), "buffers": torch.empty(0)}
    replies = [
        phase.client(state, {"indices": torch.zeros(2, dtype=torch.int32)}, context(env, torch.zeros(1, 1), client=k))[
            1
        ]
        for k in range(3)
    ]
    assert [reply.weight for reply in replies] == [1.0, 0.25, 1.0]  # type: ignore[union-attr]
    assert phase.up(1)["logits"].reduce.weights == "reply"  # type: ignore[union-attr]
    assert FedMD().phases(env)[0].up(1)["logits"].reduce.weights == "uniform"  # type: ignore[union-attr]


def test_weights_move_the_consensus(tmp_path: Path) -> None:
    """With nearly all the weight on client 0 the consensus is its scores."""
    table = SMALL | {"weights": [1.0, 1e-7, 1e-7, 1e-7, 1e-7]}
    job = job_of(table, data=PUBLIC, participation=1.0, rounds=1)
    state, down = downloads_of(job, tmp_path)[1, "digest", 0]
    env: Any = Federation.build(job, InProcess.alone()).env
    model = env.model(0)
    model.load(state["model"], state["buffers"])
    expected = scores(model, env.public.x, down["indices"].long())
    torch.testing.assert_close(down["consensus"], expected, rtol=0, atol=1e-5)


def test_the_official_subset_has_every_class_in_proportion() -> None:
    """Of 60 samples of class 0, 30 of class 1 and 10 of class 2, ten are 6, 3 and 1; the paper's are as they come."""
    env = env_of(Prior([0.0, 0.0, 0.0]), public=100)
    env.public.labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)

    def counts(algorithm: FedMD, round_: int) -> list[int]:
        return torch.bincount(env.public.labels[algorithm.subset(env, round_).long()], minlength=3).tolist()

    official = FedMD(variant="official", subset_size=10)
    assert [counts(official, t) for t in range(1, 6)] == [[6, 3, 1]] * 5
    assert not torch.equal(official.subset(env, 1), official.subset(env, 2))
    assert counts(FedMD(variant="paper", stratified=True, subset_size=10), 1) == [6, 3, 1]
    for algorithm in (FedMD(subset_size=10), FedMD(variant="official", stratified=False, subset_size=10)):
        assert len({tuple(counts(algorithm, t)) for t in range(1, 9)}) > 1
    assert len(FedMD(subset_size=500).subset(env, 1)) == 100


def test_every_beginning_is_in_proportion() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    assert labels[in_proportion(labels)].tolist() == [0, 1, 0, 0, 1, 0]


# --- identities -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("local", [ADAM, {"epochs": 2, "batch_size": 8, "lr": 0.1, "momentum": 0.5}])
@pytest.mark.parametrize("transfer", [None, {"public_epochs": 2, "private_epochs": 2}])
def test_without_a_digest_it_is_local(local: dict[str, Any], transfer: Any, tmp_path: Path) -> None:
    """Bit for bit, with optimisers that are new every round, as those of `local` are; absent clients too."""
    job = {"data": PUBLIC, "local": local, "transfer": transfer, "rounds": 4}
    alone = run(job_of({"name": "local"}, **job), tmp_path / "local")
    table = SMALL | {"digest_epochs": 0, "moments": "reset"}
    fedmd = run(job_of(table, **job), tmp_path / "fedmd", 3)
    assert_same_bits(clients(fedmd), clients(alone))
    assert [row["accuracy"] for row in fedmd.rows] == [row["accuracy"] for row in alone.rows]
    kept = run(job_of(SMALL | {"digest_epochs": 0}, **job), tmp_path / "kept")
    assert kept.rows[-1]["train_loss"] != fedmd.rows[-1]["train_loss"]


def clients(outcome: Outcome) -> dict[str, Tensor]:
    return {
        f"{client}/{name}": record["state"][name]
        for client, record in sorted(outcome.clients.items())
        for name in ("model", "buffers")
    }


def test_two_rounds_of_revisits_are_one_of_twice_the_steps() -> None:
    """Where the optimisers keep their moments: SGD with momentum on one sample, 3 + 3 steps against 6."""
    env = env_of(Prior([0.0, 0.0, 0.0]), public=4)
    algorithm = FedMD(subset_size=4, digest_epochs=0)
    down = {"indices": torch.zeros(4, dtype=torch.int32), "consensus": torch.zeros(4, 3)}
    client = algorithm.phases(env)[1].client
    sample = torch.zeros(1, 1), torch.tensor([2])

    def after(rounds: int, steps: int) -> Tensor:
        state: State = {"model": torch.zeros(3), "buffers": torch.empty(0)}
        for t in range(rounds):
            state, _ = client(state, down, context(env, *sample, round_=t + 1, steps=steps, momentum=0.9, lr=0.1))
        model: Tensor = state["model"]
        return model

    assert torch.equal(after(2, 3), after(1, 6))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_optimiser_goes_on_where_it_was(optimizer: str) -> None:
    settings = SimpleNamespace(momentum=0.9, nesterov=False, weight_decay=0.0)
    gradients = [torch.randn(3, generator=torch.Generator().manual_seed(step)) for step in range(5)]

    def steps(values: Tensor, some: list[Tensor], state: State) -> State:
        made: Any = (Adam if optimizer == "adam" else Sgd)([values], settings, 0.1)
        made.restore(state)
        for gradient in some:
            made.step([gradient.clone()])
        after: State = made.state()
        return after

    whole, parts = torch.zeros(3), torch.zeros(3)
    end = steps(whole, gradients, {})
    again = steps(parts, gradients[2:], steps(parts, gradients[:2], {}))
    assert torch.equal(whole, parts)
    assert_same_bits(again, end)


# --- who did not come -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("phase", ["score", "digest"])
def test_a_client_that_fails_in_a_phase_stays_in_step(phase: str, tmp_path: Path) -> None:
    """Client 1 fails once, in round 2. It is reported, the others go on, and what it digests is this round's.

    Failing to score, it is not part of the consensus, yet can digest it; failing to digest, it keeps its model.
    """
    job = job_of(SMALL, data=PUBLIC, participation=1.0, rounds=3)

    def prepare(engine: Engine) -> None:
        def failing(one: Any) -> Any:
            def client(state: State, down: Payload, ctx: Any) -> Any:
                if (one.name, ctx.round, ctx.id) == (phase, 2, 1):
                    raise RuntimeError("out of memory")
                return one.client(state, down, ctx)

            return dataclasses.replace(one, client=client)

        engine.phases = tuple(map(failing, engine.phases))

    outcome = run(job, tmp_path / "failing", 2, prepare=prepare)
    assert [[gone["client"] for gone in row["absent"]] for row in outcome.rows] == [[], [1], []]
    assert [row["replies"] for row in outcome.rows] == [5, 4, 5]
    first = run(job_of(SMALL, data=PUBLIC, participation=1.0, rounds=1), tmp_path / "first")
    second = run(job_of(SMALL, data=PUBLIC, participation=1.0, rounds=2), tmp_path / "second", 2, prepare=prepare)
    kept, before = (outcome.clients[1]["state"]["model"] for outcome in (second, first))
    assert torch.equal(kept, before) == (phase == "digest")


def test_a_client_begins_when_it_first_comes(tmp_path: Path) -> None:
    """Three of five a round. The baseline stands in the round of those who come for the first time, and there alone."""
    job = job_of(SMALL, data=PUBLIC, rounds=6, transfer={"public_epochs": 1, "private_epochs": 1})
    outcome = run(job, tmp_path, 3)
    roster, known = Federation.build(job, InProcess.alone()).roster, set[int]()
    for row in outcome.rows:
        newcomers = set(roster.sample(row["round"])) - known
        known |= newcomers
        assert ("baseline_accuracy" in row) == bool(newcomers)
        if len(newcomers) > 1:
            assert {client for client, _ in row["baseline_accuracy_of_clients"]} == newcomers
    assert known == set(range(CLIENTS)) == set(outcome.clients)


# --- transfer learning ------------------------------------------------------------------------------------------------
def test_the_transfer_is_public_and_then_private_and_its_moments_go_on() -> None:
    """Public samples of label 0 and one of one's own of label 2, one step of lr 0.1 each from b = 0.

    Adam's first step is lr against the gradient's sign: (0.1, -0.1, -0.1) after the public step, and, with new moments,
    (0, -0.2, 0) after the private one. The classifier's Adam is the private one's, which the revisits go on with.
    """
    env = env_of(Prior([0.0, 0.0, 0.0]), public=4)
    env.public.labels = torch.zeros(4, dtype=torch.int64)
    env.transfer = Transfer(lr=0.1, public_epochs=1, public_validation=0.0, private_epochs=1)
    sample, tested = (torch.zeros(1, 1), torch.tensor([2])), []

    def begin(algorithm: FedMD, optimizer: str) -> State:
        ctx = context(env, *sample, optimizer=optimizer)
        ctx._test = lambda values, client: tested.append(values[0]) or {"accuracy": 0.25}  # type: ignore[func-returns-value]
        state = algorithm.begin(ctx)
        assert ctx.logged["baseline_accuracy"] == 0.25 and torch.equal(tested[-1], state["model"])
        return state

    state = begin(FedMD(subset_size=4), "adam")
    close(state["model"], [0.0, -0.2, 0.0])
    p = torch.tensor([0.1, -0.1, -0.1]).softmax(dim=0)
    close(state["revisit"]["mean"], (0.1 * (p - torch.tensor([0.0, 0.0, 1.0]))).tolist())
    assert float(state["revisit"]["steps"]) == 1 and "digest" not in state
    down = {"indices": torch.zeros(4, dtype=torch.int32), "consensus": torch.zeros(4, 3)}
    after, _ = FedMD(digest_epochs=0).phases(env)[1].client(state, down, context(env, *sample, optimizer="adam"))
    assert float(after["revisit"]["steps"]) == 2
    assert "revisit" not in begin(FedMD(moments="reset"), "adam")
    assert "revisit" not in begin(FedMD(), "sgd")


@pytest.mark.parametrize("name", ["fedmd", "local", "pooled"])
def test_the_bounds_are_runs_of_the_same_job(name: str, tmp_path: Path) -> None:
    """`local` begins where FedMD does; `pooled` has one client a model, each with all samples, and so begins better."""
    transfer = {"public_epochs": 2, "private_epochs": 4, "private_batch_size": 8}
    table = SMALL if name == "fedmd" else {"name": name}
    job = job_of(table, data=PUBLIC, participation=1.0, client_models=OWN, transfer=transfer, rounds=1)
    outcome = run(job, tmp_path / name, 3)
    baselines = dict(outcome.rows[0]["baseline_accuracy_of_clients"])
    if name == "pooled":
        assert len(outcome.clients) == 2
        sizes = [record["state"]["model"].numel() for record in outcome.clients.values()]
        assert sizes == [30, 64]
        assert Federation.build(job, InProcess.alone()).roster.examples == (DATA["samples"],) * 2
    else:
        fedmd = run(job_of(SMALL, **_same(job)), tmp_path / "again")
        assert baselines == dict(fedmd.rows[0]["baseline_accuracy_of_clients"])
    assert 0 < outcome.rows[0]["public_accuracy"] <= 1


def _same(job: Any) -> dict[str, Any]:
    document = job.model_dump(mode="json")
    return {key: document[key] for key in ("data", "participation", "client_models", "transfer", "rounds")}


def test_the_public_part_depends_on_the_architecture_alone(tmp_path: Path) -> None:
    """Without a private part, clients of one architecture begin alike; `once` computes it once a rank."""
    job = job_of(SMALL, data=PUBLIC, participation=1.0, client_models=OWN, transfer={"private_epochs": 0})
    seen = downloads_of(job, tmp_path)
    states = [seen[1, "digest", client][0]["model"] for client in range(CLIENTS)]
    assert torch.equal(states[0], states[2]) and torch.equal(states[1], states[3])
    env: Any = Federation.build(job, InProcess.alone()).env
    assert not torch.equal(states[0], env.initial(0)[0])
    made = []

    def make(client: int) -> Callable[[], State]:
        return lambda: made.append(client) or {}  # type: ignore[func-returns-value]

    for client in range(CLIENTS):
        env.once("purpose", client, make(client))
    assert made == [0, 1]


def stage(samples: int, **keys: Any) -> Stage:
    """Samples that a model without input cannot tell apart: label 0 always."""
    defaults: dict[str, Any] = {"epochs": 50, "batch_size": 4, "validation": 0.25, "patience": 2, "min_delta": 0.001}
    env = ToyEnv(Prior([0.0, 0.0, 0.0]), 1)
    return Stage(Numbers(samples).x, torch.zeros(samples, dtype=torch.int64), **(defaults | keys),
                 generator=lambda purpose: env.generator(purpose))  # fmt: skip


def test_training_stops_on_samples_set_aside_and_keeps_the_best() -> None:
    """Eight samples of label 0, two set aside; b = (0, 1, 0) says 1 at first.

    Adam with lr 0.3 moves b_0 up and b_1 down by 0.3 a step, so after two steps of the first epoch, (6 in batches of
    4 and 2), b = (0.6, 0.4, ...) says 0: accuracy 1, which no later epoch improves on. With a patience of 2 there are
    three epochs, and the model kept is the first one's: of 2 steps, not 6.
    """
    model = FlatModel(Prior([0.0, 1.0, 0.0]))
    local = context(ToyEnv(Prior([0.0]), 1), torch.zeros(1, 1)).local
    start = {"model": torch.tensor([0.0, 1.0, 0.0]), "buffers": torch.empty(0)}
    kept = to_convergence(model, start, stage(8), local, 0.3)
    assert float(kept["validation"]) == 1.0 and float(kept["moments"]["steps"]) == 2
    assert kept["model"][0] == pytest.approx(0.6, abs=0.02)
    assert model.parameters[0] > 1.2  # where the training ended
    never = to_convergence(model, start, stage(8, epochs=0), local, 0.3)
    assert torch.equal(never["model"], start["model"]) and "validation" not in never


def test_samples_set_aside_are_not_trained_on() -> None:
    """Two of eight are only tested, after every one of two epochs over the six others."""
    module = Recorder()
    local = context(ToyEnv(Prior([0.0]), 1), torch.zeros(1, 1)).local
    start = {"model": torch.zeros(1), "buffers": torch.empty(0)}
    to_convergence(FlatModel(module), start, stage(8, epochs=2), local, 0.1)
    given = {mode: [x for training, batch in module.given for x in batch if training == mode] for mode in (True, False)}
    assert len(given[True]) == 2 * 6 and len(given[False]) == 2 * 2
    assert sorted(set(given[True]) | set(given[False])) == list(range(8))
    assert not set(given[True]) & set(given[False])


def test_with_nothing_set_aside_the_training_loss_says_when() -> None:
    """All eight samples are used, the last epoch is kept; one whose loss falls by less than `min_delta` is none."""
    model = FlatModel(Prior([0.0, 0.0, 0.0]))
    local = context(ToyEnv(Prior([0.0]), 1), torch.zeros(1, 1)).local
    start = {"model": torch.zeros(3), "buffers": torch.empty(0)}
    long = to_convergence(model, start, stage(8, validation=0.0, epochs=7), local, 0.1)
    assert float(long["moments"]["steps"]) == 7 * 2 and "validation" not in long
    short = to_convergence(model, start, stage(8, validation=0.0, epochs=7, min_delta=10.0), local, 0.1)
    assert float(short["moments"]["steps"]) == 3 * 2  # the first is progress against none, two are not


def test_the_test_set_has_no_say(tmp_path: Path) -> None:
    """Another test set, the same training: what is tested never reaches a model."""
    transfer = {"public_epochs": 2, "private_epochs": 3, "private_validation": 0.3}
    outcomes = [
        run(job_of(SMALL, data=PUBLIC | {"test_samples": n}, local=ADAM, transfer=transfer), tmp_path / str(n))
        for n in (60, 10)
    ]
    assert_same_bits(outcomes[0].tensors(), outcomes[1].tensors())


# --- the head's decay -------------------------------------------------------------------------------------------------
def test_the_head_decays_as_by_keras_regulariser() -> None:
    """The step of a loss with factor |W|^2 added, W the head's kernel: its bias and the body are free of it."""
    module: Any = initialise(lambda: Classifier(nn.Linear(2, 3), 3, 2), 0)
    model = FlatModel(module)
    start = model.parameters.detach().clone()
    x, factor = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), 0.1
    settings = SimpleNamespace(head_decay=factor, weight_decay=0.0)
    optimizer = adam_optimizer(model, settings, 0.01)
    for _ in range(3):
        model.drop_gradient()
        model(x).square().mean().backward()
        optimizer.step(model.gradients())
    ours = model.parameters.detach().clone()
    model.load(start)
    reference = torch.optim.Adam(list(module.parameters()), 0.01)
    for _ in range(3):
        reference.zero_grad()
        (model(x).square().mean() + factor * module.head.weight.square().sum()).backward()
        reference.step()
    torch.testing.assert_close(ours, model.parameters.detach(), rtol=0, atol=1e-6)


# --- bytes ------------------------------------------------------------------------------------------------------------
def test_the_bytes_of_the_paper(tmp_path: Path) -> None:
    """5,000 samples x 16 classes x 4 bytes = 320,000 each way, a client and round; the indices are 20,000, twice."""
    data = DATA | {"classes": 6, "samples": 60, "public": PUBLIC["public"] | {"samples": 5100, "classes": 10}}
    data |= {"public_classes": "union", "partition": {"name": "iid"}}
    table = {"name": "fedmd", "digest_batch_size": 1000}
    outcome = run(job_of(table, data=data, rounds=2, participation=1.0), tmp_path, 3)
    for t in (1, 2):
        assert outcome.logical()[t, "up.logits"] == 320_000 * CLIENTS
        assert outcome.logical()[t, "down.consensus"] == 320_000 * CLIENTS
        assert outcome.logical()[t, "down.indices"] == 2 * 20_000 * CLIENTS
    assert not math.isnan(outcome.rows[-1]["digest_loss"])
