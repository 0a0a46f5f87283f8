"""FAug: which samples are seeds, what is topped up, what it costs, and that the base is left as it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpifed.algorithms.base import Auxiliary
from mpifed.algorithms.faug import FAug
from mpifed.comm.inprocess import InProcess
from mpifed.errors import BadInput, TooFewReplies
from mpifed.federation.env import Context
from mpifed.federation.federation import Federation
from mpifed.federation.plan import planned_bytes
from mpifed.job import Job, load
from mpifed.learning.augmentation import Adversarial, generated, oversampled, train_conditional_gan
from mpifed.models.generators import faug_discriminator
from mpifed.types import DataSpec, State, leaves
from tests.algorithm_table import FAUG, FEDFTG, MENTORS, SHAPE, STEPS, assert_same_bits, job_of, run
from tests.toy import ToyEnv

JOBS = Path(__file__).resolve().parents[2] / "jobs"
DIGITS: dict[str, Any] = {
    "model": {"name": "linear"},
    "data": {"name": "digits", "partition": {"name": "target_labels", "samples": 200, "kept": 2}},
}
FEW: dict[str, Any] = {"name": "faug", "base": "fd", "steps": 2, "batch_size": 4, "few": 0.2}


def on_digits(table: dict[str, Any], **changes: Any) -> Job:
    """Devices with 200 pictures, about 20 a digit, of which three digits are cut to 2."""
    return job_of(table, **DIGITS, **changes)


def contexts(job: Job) -> list[Context]:
    """Every client of a job in its first phase."""
    federation = Federation.build(job, InProcess.alone())
    return [
        Context(federation.env, client, 1, "seeds", partial(federation.samples, client), 1.0, job.local)
        for client in range(federation.clients)
    ]


# --- seeds ------------------------------------------------------------------------------------------------------------
def test_seeds_are_samples_of_the_target_labels_as_stored() -> None:
    job = on_digits(FEW)
    source: Any = Federation.build(job, InProcess.alone()).source
    federation = Federation.build(job, InProcess.alone())
    for ctx in contexts(job):
        _, reply = FAug(few=0.2).send_seeds({}, {}, ctx)
        seeds, labels = reply.upload["seeds"], reply.upload["seed_labels"]  # type: ignore[union-attr]
        targets = torch.nonzero(ctx.label_counts <= 2).squeeze(1)
        assert seeds.dtype == torch.uint8 and len(seeds) == 6 and len(targets) == 3
        assert sorted(labels.tolist()) == sorted(2 * targets.tolist())
        stored, _ = source.take("train", federation.partition.train[ctx.id])
        for seed, label in zip(seeds, labels, strict=True):
            (place,) = torch.nonzero((stored == seed).flatten(1).all(dim=1)).squeeze(1)[:1]
            assert int(ctx.y[place]) == int(label)


def test_redundant_labels_hide_the_targets() -> None:
    """Three targets of 2 samples and two redundant labels of 5 seeds; the same redundant ones when asked again."""
    for ctx in contexts(on_digits(FEW)):
        hiding = FAug(few=0.2, redundant=2)
        targets, redundant = hiding.targets(ctx)
        assert (int(targets.sum()), int(redundant.sum()), bool((targets & redundant).any())) == (3, 2, False)
        assert torch.equal(hiding.targets(ctx)[1], redundant)
        _, reply = hiding.send_seeds({}, {}, ctx)
        assert len(reply.upload["seeds"]) == 3 * 2 + 2 * 5  # type: ignore[union-attr]


def test_pixels_are_exact() -> None:
    spec = DataSpec((3, 16, 16), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    assert torch.equal(spec.pixels(spec.standardise(x)), x)
    with pytest.raises(ValueError, match="no pixels"):
        spec.pixels(torch.full((1, 3, 16, 16), 0.123))
    with pytest.raises(ValueError, match="no pixels"):
        spec.pixels(spec.standardise(x) + 10)


def test_data_that_is_no_pixels_has_to_say_so(tmp_path: Path) -> None:
    with pytest.raises(TooFewReplies, match="no pixels of 8 bit"):
        run(job_of(FAUG | {"stored": "uint8", "few": 1.0}), tmp_path)


# --- what is topped up ------------------------------------------------------------------------------------------------
def test_target_labels_are_topped_up_to_the_level_of_the_others(tmp_path: Path) -> None:
    job = on_digits(FEW | {"redundant": 1}, rounds=1, participation=1.0)
    outcome = run(job, tmp_path, 3)
    sent = set()
    for ctx in contexts(job):
        state = outcome.clients[ctx.id]["state"]
        assert state["samples"].dtype == torch.uint8 and state["samples"].shape[1:] == (1, 8, 8)
        targets = ctx.label_counts <= 2
        level = round(float(ctx.label_counts[~targets].double().mean()))
        counts = ctx.label_counts + torch.bincount(state["labels"], minlength=10)
        assert (counts[targets] == level).all() and torch.equal(counts[~targets], ctx.label_counts[~targets])
        more = FAug().with_more(state, ctx)
        assert torch.equal(more.label_counts, counts) and more.examples == len(more.x) == int(counts.sum())
        assert torch.equal(more.x[: ctx.examples], ctx.x) and ctx.examples == len(ctx.x)
        labels = FAug(few=0.2, redundant=1).targets(ctx)
        sent |= set(torch.nonzero(labels[0] | labels[1]).squeeze(1).tolist())
    row = outcome.rows[0]
    assert row["leakage_to_server"] == pytest.approx(3 / 4)
    assert row["leakage_to_devices"] == pytest.approx(3 / len(sent))
    assert row["generated"] > 3 * 10


def test_a_label_that_a_device_has_none_of_is_topped_up_too() -> None:
    """Where another device sent seeds of it, which the download says; and not where nobody did."""
    job = on_digits(FEW)
    ctx, algorithm = contexts(job)[0], FAug(few=0.2)
    missing, unknown = (int(label) for label in ctx.label_counts.topk(2).indices)
    ctx.label_counts = ctx.label_counts.clone()
    ctx.label_counts[[missing, unknown]] = 0
    generator = algorithm.generator(ctx.env)
    known = torch.ones(10, dtype=torch.uint8)
    known[unknown] = 0
    down = {"generator": torch.cat([generator.parameters, generator.buffers]), "seed_labels": known}
    state, _ = algorithm.augment({"base": {}}, down, ctx)
    made = torch.bincount(state["labels"], minlength=10)
    level = round(float(ctx.label_counts[ctx.label_counts > 2].double().mean()))
    assert int(made[missing]) == level and int(made[unknown]) == 0
    assert int(made.sum()) == level + 3 * (level - 2)


# --- bytes ------------------------------------------------------------------------------------------------------------
def test_the_bits_of_the_papers_table() -> None:
    """47,886,720 bit a device: 1,493,520 numbers of 32 bit and 15 pictures of 784 pixels of 8 bit. What the paper does
    not count: 1,000 numbers of the labels' embedding, the labels of the seeds (16 bit), which labels there were."""
    changes = ("data.name=synthetic", "data.samples=600", "data.test_samples=60", "data.partition.samples=60")
    job = load((JOBS / "fd" / "paper_fd_faug.toml").read_text(), changes)
    totals, open_kinds = planned_bytes(Federation.build(job, InProcess.alone()))
    bits = {kind: 8 * size // job.clients for kind, size in totals.items()}
    assert bits["down.generator"] == (1_493_520 + 1_000) * 32
    assert bits["down.generator"] - 1_000 * 32 + 15 * 784 * 8 == 47_886_720
    assert bits["up.outputs"] + bits["down.teacher"] == 102_400
    assert bits["down.seed_labels"] == 10 * 8
    assert sorted(open_kinds) == ["up.seed_labels", "up.seeds"]


def test_seeds_travel_as_bytes(tmp_path: Path) -> None:
    """Five devices, three target digits, two pictures of 64 pixels each; labels in 16 bit."""
    logical = run(on_digits(FEW, rounds=2), tmp_path, 2).logical()
    assert logical[1, "up.seeds"] == 5 * 3 * 2 * 64 and logical[1, "up.seed_labels"] == 5 * 3 * 2 * 2
    assert not {kind for t, kind in logical if t == 2} & {"up.seeds", "down.generator"}


# --- the base ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "base",
    [
        {"name": "fedavg"},
        {"name": "fd", "exchange": "broadcast"},
        {"name": "scaffold", "payload": "derived"},
        {"name": "feddistill_plus"},
        {"name": "fedkd"},
    ],
    ids=lambda table: table["name"],
)
@pytest.mark.parametrize("codec", ["identity", "half"])
def test_without_targets_it_is_the_base(base: dict[str, Any], codec: str, tmp_path: Path) -> None:
    """No label is below a thousandth of an equal share unless a client has none of it, and nobody sends seeds of it."""
    changes: dict[str, Any] = {"local": STEPS, "codec": codec, "evaluate": {"own": True}}
    if base["name"] == "fedkd":
        changes["client_models"] = MENTORS
    alone = run(job_of(base, **changes), tmp_path / "base", 3)
    wrapped = run(job_of(FAUG | {"base": base, "few": 0.001}, **changes), tmp_path / "faug", 3)
    assert_same_bits(
        {path.replace("server/base/", "server/"): t for path, t in wrapped.tensors().items() if "server/" in path},
        {path: t for path, t in alone.tensors().items() if "server/" in path},
    )
    for client, record in alone.clients.items():
        assert_same_bits(flat(wrapped.clients[client]["state"]["base"]), flat(record["state"]))
    for one, other in zip(alone.rows, wrapped.rows, strict=True):
        assert (one["accuracy"], one["loss"], one["train_loss"]) == (
            other["accuracy"],
            other["loss"],
            other["train_loss"],
        )


def flat(state: State) -> dict[str, Tensor]:
    return dict(sorted(leaves(state)))


def test_what_cannot_be_run_is_refused_before_round_1(tmp_path: Path) -> None:
    """Whatever the base would refuse by itself, too."""
    with pytest.raises(BadInput, match="algorithm.base: there is nothing to augment"):
        job_of({"name": "faug", "base": "pooled"})
    with pytest.raises(BadInput, match="algorithm.batch_size: must be at least 2"):
        job_of(FAUG | {"batch_size": 1})
    with pytest.raises(BadInput, match="client_models: faug gives every client a model of its own"):
        job_of(FAUG | {"base": "fedkd"})
    official = {"name": "fedkd", "variant": "official"}
    with pytest.raises(BadInput, match="algorithm.projection: hidden states of width 5"):
        Federation.build(job_of(FAUG | {"base": official}, client_models=MENTORS), InProcess.alone())


@pytest.mark.parametrize("table", [FAUG, FEDFTG], ids=["faug", "fedftg"])
def test_texts_are_refused_before_round_1(table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text/trec").mkdir(parents=True)
    for name in ("train_5500.label", "TREC_10.label"):
        (tmp_path / "text/trec" / name).write_text("HUM:x who is it ?\nLOC:x where is it ?\n" * 10)
    job = job_of(
        table,
        model={"name": "transformer", "layers": 1, "width": 8, "feedforward": 8},
        data={"name": "trec", "root": str(tmp_path), "length": 6, "min_count": 1, "partition": {"name": "iid"}},
    )
    with pytest.raises(BadInput, match=f"algorithm.name: {table['name']} generates inputs of real numbers, and texts"):
        Federation.build(job, InProcess.alone())


# --- the generator ----------------------------------------------------------------------------------------------------
def test_oversampling_shifts_and_stays_in_range() -> None:
    images = torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    random = torch.Generator().manual_seed(1)
    assert torch.equal(oversampled(images, 0, 0.0, random), images)
    moved = oversampled(images, 2, 0.0, random)
    inner = images[:, :, 2:4, 2:4]  # which no shift by two can move out
    for before, after in zip(inner, moved, strict=True):
        windows = after[0].unfold(0, 2, 1).unfold(1, 2, 1).reshape(-1, 2, 2)
        assert any(torch.equal(window, before[0]) for window in windows)
    assert not torch.equal(moved, images)
    noisy = oversampled(images, 0, 0.5, random)
    assert noisy.abs().max() <= 1 and not torch.equal(noisy, images)
    no_image = torch.zeros(3, *SHAPE)
    assert torch.equal(oversampled(no_image, 2, 0.0, random), no_image)


def trained(steps: int, seed: int = 0) -> Auxiliary:
    """A generator of four numbers, taught that those of label 0 are -0.7 and those of label 1 are 0.7."""
    env: Any = ToyEnv(nn.Linear(1, 1), 1)
    env.spec = DataSpec((4,), 2)
    generator = FAug(noise=3).generator(env)
    discriminator = env.auxiliary("discriminator", lambda: faug_discriminator(2, (4,)))
    seeds, labels = torch.tensor([[-0.7] * 4] * 5 + [[0.7] * 4]), torch.tensor([0, 0, 0, 0, 0, 1])
    settings = Adversarial(steps, batch_size=32, lr=1e-3, noise=3, shift=0, jitter=0.1)
    random = torch.Generator().manual_seed(seed)
    generator.model.load(*train_conditional_gan(generator, discriminator, seeds, labels, settings, random))
    return generator


def test_the_generator_learns_what_belongs_to_a_label() -> None:
    generator, random = trained(80).model, torch.Generator().manual_seed(2)
    means = [float(generated(generator, torch.full((50,), label), 3, random).mean()) for label in (0, 1)]
    assert means[0] < -0.2 and means[1] > 0.2


def test_the_generator_is_a_function_of_seeds_and_randomness() -> None:
    first, again, other = (trained(3, seed).model.parameters.detach() for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
