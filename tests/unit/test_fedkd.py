"""FedKD: what it is without distillation, who is in step with whom, and what the switches do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpifed.codecs.svd import DENSE, Svd
from mpifed.comm.inprocess import InProcess, run_ranks
from mpifed.engine import Engine
from mpifed.errors import BadInput
from mpifed.federation.federation import Federation
from mpifed.models.classifier import Classifier
from mpifed.types import DataSpec, State
from tests.algorithm_table import (
    ADAM,
    CLASSES,
    CLIENTS,
    MENTORS,
    ROUNDS,
    SHAPE,
    Outcome,
    assert_same_bits,
    engine_of,
    job_of,
    run,
)

SVD = {"up.update": "svd(energy=[0.7, 0.9])", "down.update": "svd(energy=[0.7, 0.9])"}


def fedkd(**keys: Any) -> dict[str, Any]:
    return {"name": "fedkd"} | keys


def fedkd_job(table: dict[str, Any] | None = None, **changes: Any) -> Any:
    return job_of(fedkd() if table is None else table, **({"client_models": MENTORS} | changes))


def own(outcome: Outcome, name: str) -> list[Tensor]:
    """A tensor of every client's state."""
    return [outcome.clients[client]["state"][name] for client in range(CLIENTS)]


# --- identities -------------------------------------------------------------------------------------------------------
ALONE = fedkd(distillation=0.0, hidden=0.0, attention=0.0)


@pytest.mark.parametrize("local", [None, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("codec", ["identity", {"up.update": "svd(energy=0.6)"}], ids=["identity", "svd up"])
def test_without_distillation_the_mentee_is_fedavg(local: Any, codec: Any, tmp_path: Path) -> None:
    """Bit for bit, running statistics too: batches, steps, means and sums are the same."""
    keys = {} if local is None else {"local": local}
    both = run(fedkd_job(ALONE, codec=codec, **keys), tmp_path / "fedkd", 3)
    average = run(job_of({"name": "fedavg", "weighting": "uniform"}, codec=codec, **keys), tmp_path / "fedavg")
    assert_same_bits(both.server, average.server)
    for row, expected in zip(both.rows, average.rows, strict=True):
        assert row["server_accuracy"] == expected["accuracy"] and row["server_loss"] == expected["loss"]


def test_without_distillation_the_mentors_are_alone(tmp_path: Path) -> None:
    """Bit for bit what `local` makes of the same models."""
    both = run(fedkd_job(ALONE, participation=1.0), tmp_path / "fedkd")
    local = run(job_of({"name": "local"}, client_models=MENTORS, participation=1.0), tmp_path / "local")
    for client in range(CLIENTS):
        one, other = both.clients[client]["state"], local.clients[client]["state"]
        assert torch.equal(one["mentor"], other["model"]) and torch.equal(one["mentor_buffers"], other["buffers"])
    assert [row["accuracy"] for row in both.rows] == [row["accuracy"] for row in local.rows]


def test_distillation_reaches_both_models(tmp_path: Path) -> None:
    """Each term by itself moves mentee and mentor, of a client that took part, from where they go without."""
    plain = run(fedkd_job(ALONE, rounds=1, participation=1.0), tmp_path / "alone")
    for term in ("distillation", "hidden"):
        outcome = run(fedkd_job(ALONE | {term: 1.0}, rounds=1, participation=1.0), tmp_path / term)
        assert (outcome.server["model"] - plain.server["model"]).norm() > 1e-4
        for client in (0, 2, 4):  # the others' mentors begin as the mentee does, and agree with it from then on
            assert (own(outcome, "mentor")[client] - own(plain, "mentor")[client]).norm() > 1e-4
        assert (outcome.rows[0]["distance"] > 0) == (term == "hidden")
        assert (outcome.rows[0]["divergence"] > 0) == (term == "distillation")


# --- everybody in step ------------------------------------------------------------------------------------------------
def in_step(outcome: Outcome) -> None:
    """All clients, absent ones too, hold the server's mentee, in every bit."""
    assert sorted(outcome.clients) == list(range(CLIENTS))
    for mentee, buffers in zip(own(outcome, "mentee"), own(outcome, "mentee_buffers"), strict=True):
        assert torch.equal(mentee, outcome.server["model"])
        assert torch.equal(buffers, outcome.server["buffers"])


@pytest.mark.parametrize("codec", ["half", SVD, "svd(energy=0.8, feedback=true)"], ids=str)
@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_everybody_is_in_step_after_every_round(codec: Any, ranks: int, tmp_path: Path) -> None:
    """Two clients of five a round, so that one at least is away from the first two; all codecs both ways."""
    held: dict[int, dict[int, Tensor]] = {}
    servers: dict[int, Tensor] = {}

    def prepare(engine: Engine) -> None:
        train = engine._run_round

        def one_round(round_: int) -> bool:
            stopped = train(round_)
            mentees = {client: record["state"]["mentee"] for client, record in engine.store.items()}
            held.setdefault(round_, {}).update(mentees)
            if engine.server is not None:
                servers[round_] = engine.server["model"]
            return stopped

        engine._run_round = one_round  # type: ignore[method-assign]

    in_step(run(fedkd_job(codec=codec, participation=2), tmp_path, ranks, prepare=prepare))
    assert sorted(held) == sorted(servers) == list(range(1, ROUNDS + 1))
    for round_, mentees in held.items():
        assert sorted(mentees) == list(range(CLIENTS))
        assert all(torch.equal(mentee, servers[round_]) for mentee in mentees.values())
    assert not torch.equal(servers[1], servers[2])


def test_in_step_after_a_stop_and_a_resume_on_other_ranks(tmp_path: Path) -> None:
    """Stopped after round 2 of 4 by a signal, both ways compressed on a schedule, and resumed: the same bits."""
    job = fedkd_job(codec=SVD, rounds=4)
    whole = run(job, tmp_path / "whole", 3)
    in_step(whole)

    def stopped(comm: Any) -> bool:
        engine = engine_of(job, comm, tmp_path / "parts")
        train, rounds = engine._run_round, iter(range(1, 5))

        def one_round(round_: int) -> bool:
            engine._stop.asked = next(rounds) == 2
            return train(round_)

        engine._run_round = one_round  # type: ignore[method-assign]
        return engine.run()

    assert run_ranks(3, stopped) == [False] * 3
    again = run(job, tmp_path / "parts", 2, resume=True)
    assert_same_bits(again.tensors(), whole.tensors())
    assert (again.metrics(), again.logical()) == (whole.metrics(), whole.logical())


def test_a_client_that_fails_is_in_step(tmp_path: Path) -> None:
    """Client 1 fails to train in round 2 and is told of the others' update nonetheless."""

    def prepare(engine: Engine) -> None:
        train, *rest = engine.phases

        def client(state: State, down: Any, ctx: Any) -> Any:
            if (ctx.round, ctx.id) == (2, 1):
                raise RuntimeError("out of order")
            return train.client(state, down, ctx)

        engine.phases = (type(train)(**(vars(train) | {"client": client})), *rest)

    outcome = run(fedkd_job(codec=SVD, participation=1.0, evaluate={"own": True}), tmp_path, 2, prepare=prepare)
    assert [row["replies"] for row in outcome.rows] == [5, 4, 5]
    assert all(0 < row["accuracy_own"] <= 1 for row in outcome.rows)  # of the mentors, on samples of their own labels
    in_step(outcome)


# --- svd --------------------------------------------------------------------------------------------------------------
def test_svd_drops_no_tensor_and_leaves_vectors_as_they_are(tmp_path: Path) -> None:
    """The head of 3 x 3 and its bias of 3 numbers among them, which the authors' code takes for factors."""
    dense, compressed = (
        run(fedkd_job(codec=codec, rounds=1), tmp_path / name)
        for name, codec in (("dense", "identity"), ("svd", "svd(energy=0.3)"))
    )
    env = Federation.build(fedkd_job(), InProcess.alone()).env
    start, layout = env.initial()[0], env.model().layout
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        moved, exact = (layout.views(outcome.server["model"] - start)[name] for outcome in (compressed, dense))
        assert moved.norm() > 1e-4, name
        assert torch.equal(moved, exact) == (len(shape) == 1), name
    assert (3,) in layout.shapes and compressed.logical()[1, "up.update"] < dense.logical()[1, "up.update"]


def image_model(spec: DataSpec, *, width: int = 6) -> nn.Module:
    """A convolution and a linear layer."""
    body = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 12), nn.ReLU())
    return Classifier(body, 12, spec.classes)


def test_energies_of_a_run_follow_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix of every upload and download: K is the smallest rank whose energy is above T, to 1e-6, with
    T = 0.95 + (0.98 - 0.95) r / R, by an exact decomposition in float64; what is decoded has that energy."""
    seen: list[tuple[float, Tensor, Tensor, Any, Svd]] = []
    encode: Callable[..., Any] = Svd.encode

    def watched(self: Svd, value: Tensor, layout: Any, memory: State, progress: float, seed: int = 0) -> Any:
        data, kept = encode(self, value, layout, memory, progress, seed)
        if layout is not None:
            seen.append((progress, value.clone(), data, layout, self))
        return data, kept

    monkeypatch.setattr(Svd, "encode", watched)
    data = {"name": "digits", "partition": {"name": "dirichlet", "alpha": 0.5}}
    here = "tests.unit.test_fedkd:image_model"
    job = fedkd_job(
        codec={"up.update": "svd", "down.update": "svd"},
        data=data,
        model={"name": here, "width": 6},
        client_models=[{"name": here, "width": 10}],
        local={"steps": 10, "batch_size": 16, "lr": 0.1},
    )
    run(job, tmp_path)
    assert len(seen) == ROUNDS * (3 + 1)
    assert sorted({progress for progress, *_ in seen}) == pytest.approx([1 / 3, 2 / 3, 1])
    ranks = []
    for progress, value, data_bytes, layout, codec in seen:
        threshold = 0.95 + 0.03 * progress
        decoded = layout.views(codec.decode(data_bytes, value.shape, value.dtype, layout))
        tags = iter(codec.tags(data_bytes, tuple(value.shape), value.dtype, layout))
        for name, tensor in layout.views(value).items():
            if tensor.dim() == 1:
                assert torch.equal(decoded[name], tensor)
                continue
            matrix, rank = tensor.flatten(1).double(), next(tags)
            energies = torch.linalg.svdvals(matrix).square()
            shares = torch.cat([torch.zeros(1), (energies.cumsum(0) / energies.sum())])
            lost = (matrix - decoded[name].flatten(1).double()).square().sum() / energies.sum()
            if rank == DENSE:
                rows, columns = matrix.shape
                largest = (rows * columns - 1) // (rows + columns)
                assert lost == 0 and shares[largest] <= threshold + 1e-6
                continue
            assert rank >= 1 and shares[rank] > threshold - 1e-6 >= shares[rank - 1] - 2e-6
            assert 1 - float(lost) > threshold - 1e-6
            ranks.append(rank)
    assert len(ranks) > 20 and max(ranks) > min(ranks)


# --- optimisers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("local", [None, ADAM], ids=["momentum", "adam"])
def test_optimisers_that_are_kept(local: Any, tmp_path: Path) -> None:
    """The first round is the same; in the second the moments go on, and are the client's state."""
    keys = {"participation": 1.0} | ({} if local is None else {"local": local})
    outcomes = {
        (kept, rounds): run(fedkd_job(fedkd(optimizer_state=kept), rounds=rounds, **keys), tmp_path / f"{kept}{rounds}")
        for kept in ("fresh", "kept")
        for rounds in (1, 2)
    }
    assert torch.equal(outcomes["fresh", 1].server["model"], outcomes["kept", 1].server["model"])
    assert not torch.equal(outcomes["fresh", 2].server["model"], outcomes["kept", 2].server["model"])
    assert "optimizers" not in outcomes["fresh", 2].clients[0]["state"]
    state = outcomes["kept", 2].clients[0]["state"]["optimizers"]
    assert sorted(state) == ["mentee", "mentor", "projection"]
    if local is not None:
        assert float(state["mentor"]["steps"]) == 2 * float(
            outcomes["kept", 1].clients[0]["state"]["optimizers"]["mentor"]["steps"]
        )


def test_the_mentor_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    """Without distillation the mentee does not notice; a tiny one leaves the mentor where it was."""
    plain, slow = (
        run(fedkd_job(ALONE | keys, rounds=1, participation=1.0), tmp_path / str(len(keys)))
        for keys in ({}, {"mentor_lr": 1e-12})
    )
    assert_same_bits(plain.server, slow.server)
    env = Federation.build(fedkd_job(), InProcess.alone()).env
    for client in range(CLIENTS):
        start = env.initial(client)[0]
        torch.testing.assert_close(own(slow, "mentor")[client], start)
        assert (own(plain, "mentor")[client] - start).norm() > 1e-2


def test_each_model_is_clipped_by_itself(tmp_path: Path) -> None:
    """A step of lr 0.1 along a gradient of norm 0.01 at most: ten steps move no model by more than 0.01."""
    local = {"steps": 10, "batch_size": 8, "lr": 0.1, "clip_norm": 0.01}
    outcome = run(fedkd_job(rounds=1, participation=1.0, local=local), tmp_path)
    env = Federation.build(fedkd_job(), InProcess.alone()).env
    for client in range(CLIENTS):
        moved = (own(outcome, "mentor")[client] - env.initial(client)[0]).norm()
        assert 0.005 < moved <= 0.01 + 1e-6
    assert 0.001 < (outcome.server["model"] - env.initial()[0]).norm() <= 0.01 + 1e-6


def test_in_bfloat16(tmp_path: Path) -> None:
    """Close to what it is in float32, and not the same."""
    local = {"steps": 4, "batch_size": 8, "lr": 0.1}
    lower, full = (
        run(fedkd_job(rounds=1, local=local | {"precision": precision}), tmp_path / precision).server["model"]
        for precision in ("bfloat16", "float32")
    )
    assert 1e-5 < float((lower - full).norm() / full.norm()) < 2e-2


def test_projections_are_the_clients_own(tmp_path: Path) -> None:
    """W^h starts differently at every client, learns, and never travels."""
    outcome = run(fedkd_job(participation=1.0), tmp_path)
    matrices = [outcome.clients[client]["state"]["projection"]["0"] for client in range(CLIENTS)]
    assert [tuple(matrix.shape) for matrix in matrices] == [(5, 3), (3, 3), (5, 3), (3, 3), (5, 3)]
    env: Any = Federation.build(fedkd_job(), InProcess.alone()).env
    starts = [fedkd_job().algorithm.make().client_init(env, client)["projection"]["0"] for client in range(CLIENTS)]
    assert not torch.equal(starts[0], starts[2])
    assert all((matrix - start).norm() > 1e-3 for matrix, start in zip(matrices, starts, strict=True))
    assert not any("projection" in kind for _, kind in outcome.logical())


# --- text -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("embeddings", ["trained", "frozen"])
def test_transformers_compare_hidden_states_and_attention(embeddings: str, tmp_path: Path) -> None:
    """A mentor of three layers of width 16, a mentee of two of width 8; with as many heads, and with others."""
    words = ("who", "what", "where", "many")
    lines = [
        f"{label}:x {words[i % 4]} is it {i % 3} ?\n" for i, label in enumerate(("HUM", "DESC", "LOC", "NUM") * 12)
    ]
    (tmp_path / "text/trec").mkdir(parents=True)
    for name in ("train_5500.label", "TREC_10.label"):
        (tmp_path / "text/trec" / name).write_text("".join(lines))
    small = {"name": "transformer", "layers": 2, "width": 8, "heads": 2, "feedforward": 16, "embeddings": embeddings}
    large = small | {"layers": 3, "width": 16}

    def outcome(name: str, table: dict[str, Any], *mentors: dict[str, Any]) -> Outcome:
        job = fedkd_job(
            table,
            rounds=2,
            clients=2,
            participation=1.0,
            model=small,
            client_models=list(mentors),
            data={"name": "trec", "root": str(tmp_path), "length": 6, "min_count": 1, "partition": {"name": "iid"}},
            local={"epochs": 1, "batch_size": 8, "lr": 0.01, "optimizer": "adam"},
            codec={"up.update": 'svd(skip=["tokens"])', "down.update": 'svd(skip=["tokens"])'},
        )
        return run(job, tmp_path / name)

    both = outcome("both", fedkd(), large)
    assert [tuple(w.shape) for w in both.clients[0]["state"]["projection"].values()] == [(16, 8)] * 2
    hidden = outcome("hidden", fedkd(attention=0.0), large)
    attention = outcome("attention", fedkd(hidden=0.0), large | {"heads": 4})
    assert both.rows[0]["distance"] > hidden.rows[0]["distance"] > 0 and attention.rows[0]["distance"] > 0
    tokens = 12 * 8 if embeddings == "trained" else 0  # nine words, a mark, padding and unknown
    assert both.server["model"].numel() == tokens + 6 * 8 + 2 * (4 * 64 + 2 * 128 + 72 + 16) + 16 + 9 * 6


# --- refusals ---------------------------------------------------------------------------------------------------------
def test_what_cannot_be_run_is_refused_before_round_1() -> None:
    with pytest.raises(BadInput, match=r"client_models: fedkd gives every client a model of its own"):
        job_of(fedkd())
    for keys, message in (
        ({"kl": "sum"}, "algorithm.kl"),
        ({"mentor_lr": 0.0}, "algorithm.mentor_lr"),
        ({"distillation": -1.0}, "algorithm.distillation"),
        ({"variant": "code"}, "algorithm.variant"),
    ):
        with pytest.raises(BadInput, match=message):
            fedkd_job(fedkd(**keys))
    with pytest.raises(BadInput, match=r"algorithm.projection: hidden states of width 5 \(mentor\) and 3 \(mentee\)"):
        Federation.build(fedkd_job(fedkd(variant="official")), InProcess.alone())
    Federation.build(fedkd_job(fedkd(variant="official"), client_models=MENTORS[1:]), InProcess.alone())
    Federation.build(fedkd_job(fedkd(variant="official", hidden=0.0)), InProcess.alone())
    with pytest.raises(BadInput, match="cannot be split into a feature extractor and a head"):
        Federation.build(fedkd_job(client_models=[{"name": "tests.unit.test_fedkd:headless"}]), InProcess.alone())
    Federation.build(
        fedkd_job(fedkd(hidden=0.0), client_models=[{"name": "tests.unit.test_fedkd:headless"}]), InProcess.alone()
    )


def headless(spec: DataSpec) -> nn.Module:
    """A model without features."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SHAPE[0], CLASSES))
