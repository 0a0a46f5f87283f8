"""One table of all algorithms, over which every test that must hold for each of them runs; and a small federation.

A new algorithm joins by adding a `Row` to `ROWS`. The federation is small enough for seconds and still has what breaks
things: clients of unequal size, partial participation, and a model with batch normalisation, so that running statistics
cross the network too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpifed.comm.communicator import Communicator
from mpifed.comm.inprocess import run_ranks
from mpifed.engine import Engine
from mpifed.federation.federation import Federation
from mpifed.federation.store import ClientStore
from mpifed.job import Job, load
from mpifed.models.classifier import Classifier
from mpifed.storage.checkpoint import Checkpoints
from mpifed.types import DataSpec, State, leaves

CLIENTS = 5
PARTICIPANTS = 3
ROUNDS = 3
SHAPE = (4,)
HIDDEN = 3
CLASSES = 3


def model(spec: DataSpec) -> nn.Module:
    """A hidden layer with batch normalisation.

    Its initial parameters come from a generator of its own: ranks that are threads share torch's global one.
    """
    body = nn.Sequential(nn.Flatten(), nn.Linear(SHAPE[0], HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU())
    module = Classifier(body, HIDDEN, spec.classes)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


@dataclass(frozen=True)
class Sizes:
    """What a closed formula of bytes is made of."""

    participants: int = PARTICIPANTS
    clients: int = CLIENTS
    parameters: int = SHAPE[0] * HIDDEN + 2 * HIDDEN + HIDDEN * CLASSES + CLASSES  # linear, batch norm, linear
    buffers: int = 2 * HIDDEN  # running mean and variance
    classes: int = CLASSES


@dataclass(frozen=True)
class Row:
    """One algorithm with hyper-parameters under which each of its terms counts."""

    id: str
    """Name of the row, in the names of tests."""
    table: Mapping[str, Any]
    """`[algorithm]` of the job."""
    bytes_per_round: Callable[[Sizes, int], Mapping[str, int]]
    """Closed formula: (sizes, round from 1) -> logical bytes of the round by "direction.kind", all clients together."""
    stateful: bool = False
    """Clients keep a state from round to round."""
    evaluates: str = "server"
    """Whose model is tested: `server`, `clients` or `both`."""
    sends_statistics: bool = False
    """Running statistics reach the server even where clients keep their own: it runs the clients' models."""
    tree_tolerance: float | None = None
    """How far `reduce = "tree"` may be from the ordered result, relative to a tensor's norm, where the algorithm
    magnifies what is rounding."""
    local: Mapping[str, Any] = field(default_factory=dict)
    """`[local]` where the algorithm asks for something else than `LOCAL`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Top-level keys of the job where the algorithm asks for others than those of `job_of`."""


# --- closed formulas, float32 -----------------------------------------------------------------------------------------
def model_both_ways(sizes: Sizes, round_: int) -> dict[str, int]:
    """d parameters and b running statistics down and up, and the 8 bytes of every client's weight."""
    return model_unweighted(sizes, round_) | {"up.weight": 8 * sizes.participants}


def model_unweighted(sizes: Sizes, round_: int) -> dict[str, int]:
    """The same without weights: clients count equally."""
    d, b = 4 * sizes.parameters * sizes.participants, 4 * sizes.buffers * sizes.participants
    return {"down.model": d, "down.buffers": b, "up.update": d, "up.buffers_update": b}


def scaffold_naive(sizes: Sizes, round_: int) -> dict[str, int]:
    """2d down and 2d up."""
    d = 4 * sizes.parameters * sizes.participants
    return model_unweighted(sizes, round_) | {"down.control": d, "up.control_update": d}


def scaffold_derived(sizes: Sizes, round_: int) -> dict[str, int]:
    """2d down, d and one float64 up."""
    d = 4 * sizes.parameters * sizes.participants
    return model_unweighted(sizes, round_) | {"down.control": d, "up.displacement": 8 * sizes.participants}


def with_class_counts(of_base: Callable[[Sizes, int], dict[str, int]]) -> Callable[[Sizes, int], dict[str, int]]:
    """FedFTG: the base's bytes, and an int32 a class from every client."""

    def formula(sizes: Sizes, round_: int) -> dict[str, int]:
        counts = {"up.class_counts": 4 * sizes.classes * sizes.participants}
        return of_base(sizes, round_) | counts

    return formula


def fd(counts: bool) -> Callable[[Sizes, int], dict[str, int]]:
    """FD: a table `[classes, classes]` up and down, and, with `counts`, an int32 a class each way."""

    def formula(sizes: Sizes, round_: int) -> dict[str, int]:
        table, row = (4 * sizes.classes**power * sizes.participants for power in (2, 1))
        bytes_ = {"up.outputs": table, "down.teacher": table}
        return bytes_ | ({"up.counts": row, "down.holders": row} if counts else {})

    return formula


def fd_broadcast(sizes: Sizes, round_: int) -> dict[str, int]:
    """The sums instead of a table of one's own, and always the totals by which they are divided."""
    up = {kind: size for kind, size in fd(True)(sizes, round_).items() if kind.startswith("up.")}
    return up | {"down.sums": up["up.outputs"], "down.totals": up["up.counts"]}


def faug(of_base: Callable[[Sizes, int], dict[str, int]]) -> Callable[[Sizes, int], dict[str, int]]:
    """FAug: in round 1 the generator down to all clients, the labels of the seeds and the extent of their values.

    Its layers: noise 3 -> 256 -> 512 -> 1024 -> inputs, batch normalisations of 2 + 2, an embedding of the labels. The
    seeds are `FAUG_SEEDS` of the 120 samples: of each client's labels with fewer than half an equal share.
    """

    def formula(sizes: Sizes, round_: int) -> dict[str, int]:
        if round_ > 1:
            return of_base(sizes, round_)
        widths = (3, 256, 512, 1024, SHAPE[0])
        generator = sum(a * b + b for a, b in pairwise(widths)) + 4 * sum(widths[1:-1]) + sizes.classes * widths[0]
        down = {"down.generator": 4 * generator, "down.seed_labels": sizes.classes, "down.extent": 8}
        up = {"up.seeds": 4 * SHAPE[0] * FAUG_SEEDS, "up.seed_labels": 2 * FAUG_SEEDS}
        return {kind: size * sizes.clients for kind, size in down.items()} | up | of_base(sizes, round_)

    return formula


def feddistill(counts: bool) -> Callable[[Sizes, int], dict[str, int]]:
    """FedDistill: the same, but nothing down in round 1."""

    def formula(sizes: Sizes, round_: int) -> dict[str, int]:
        table, row = (4 * sizes.classes**power * sizes.participants for power in (2, 1))
        bytes_ = {"up.logits": table} | ({"up.counts": row} if counts else {})
        down = {"down.logits": table} | ({"down.holders": row} if counts else {})
        return bytes_ | (down if round_ > 1 else {})

    return formula


def fedkd(sizes: Sizes, round_: int) -> dict[str, int]:
    """The mentee's d and b up from the round's clients, and down to all."""
    d, b = 4 * sizes.parameters, 4 * sizes.buffers
    return {
        "up.update": d * sizes.participants,
        "up.buffers_update": b * sizes.participants,
        "down.update": d * sizes.clients,
        "down.buffers_update": b * sizes.clients,
    }


def fedkd_weighted(sizes: Sizes, round_: int) -> dict[str, int]:
    """The same and the weights."""
    return fedkd(sizes, round_) | {"up.weight": 8 * sizes.participants}


FEDDF: dict[str, Any] = {"name": "feddf", "steps": 6, "batch_size": 16, "measure_every": 3, "lr": 0.01}

FEDGEN: dict[str, Any] = {
    "name": "fedgen", "hidden": 5, "noise_size": 2, "generator_steps": 3, "generator_lr": 0.01,
    "generated_weight": 0.3, "latent_kl_weight": 0.2,
}  # fmt: skip


def fedgen(sizes: Sizes, round_: int) -> dict[str, int]:
    """FedAvg's with the model's upload in two; counts as int32; from round 2 on the generator, whose input is noise and
    label and whose output the hidden layer, its running statistics, and the prior of labels."""
    count, head = sizes.participants, HIDDEN * CLASSES + CLASSES
    average = model_both_ways(sizes, round_)
    average.pop("up.update")
    up = {"up.body_update": sizes.parameters - head, "up.head_update": head, "up.label_counts": sizes.classes}
    return average | {kind: 4 * size * count for kind, size in (up | generated(sizes, round_)).items()}


def fedgen_head(sizes: Sizes, round_: int) -> dict[str, int]:
    """The head and its weight alone, and the rest as above."""
    count, head = sizes.participants, HIDDEN * CLASSES + CLASSES
    fields = {"down.head": head, "up.head_update": head, "up.label_counts": sizes.classes}
    return {"up.weight": 8 * count} | {
        kind: 4 * size * count for kind, size in (fields | generated(sizes, round_)).items()
    }


def generated(sizes: Sizes, round_: int) -> dict[str, int]:
    """Numbers that a client is sent with the generator."""
    noise, hidden = FEDGEN["noise_size"], FEDGEN["hidden"]
    parameters = (noise + sizes.classes) * hidden + hidden + 2 * hidden + hidden * HIDDEN + HIDDEN
    fields = {"down.generator": parameters, "down.generator_statistics": 2 * hidden, "down.label_counts": sizes.classes}
    return fields if round_ > 1 else {}


def fedgen_unweighted(sizes: Sizes, round_: int) -> dict[str, int]:
    """The paper's plain mean."""
    return {kind: size for kind, size in fedgen(sizes, round_).items() if kind != "up.weight"}


def nothing(sizes: Sizes, round_: int) -> dict[str, int]:
    """No exchange."""
    return {}


def fedmd(sizes: Sizes, round_: int) -> dict[str, int]:
    """Scores up and their consensus down, 4 n C each; the n indices twice, with either phase. No weights."""
    n, p = 20, sizes.participants
    return {
        "down.indices": 2 * 4 * n * p,
        "up.logits": 4 * n * sizes.classes * p,
        "down.consensus": 4 * n * sizes.classes * p,
    }


def fedmd_weighted(sizes: Sizes, round_: int) -> dict[str, int]:
    """The same and the weights."""
    return fedmd(sizes, round_) | {"up.weight": 8 * sizes.participants}


FEDFTG: dict[str, Any] = {"name": "fedftg", "iterations": 2, "batch_size": 8, "noise": 4, "channels": 8}
DATA: dict[str, Any] = {
    "name": "synthetic",
    "samples": 120,
    "test_samples": 60,
    "input_shape": list(SHAPE),
    "classes": CLASSES,
    "partition": {"name": "dirichlet", "alpha": 0.5, "min_size": 10},
}
PUBLIC: dict[str, Any] = DATA | {
    "public": {"name": "synthetic", "samples": 60, "input_shape": list(SHAPE), "classes": CLASSES}
}
"""The same with a public set, of the same classes."""

FAUG: dict[str, Any] = {"name": "faug", "stored": "float32", "few": 0.5, "steps": 2, "batch_size": 4, "noise": 3}
FAUG_SEEDS = 11

LOCAL: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.1, "momentum": 0.5}
ADAM: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.01, "optimizer": "adam"}
STEPS: dict[str, Any] = {"steps": 4, "batch_size": 8, "lr": 0.1, "momentum": 0.5}
MENTORS: tuple[dict[str, Any], ...] = ({"name": "mlp", "hidden": [5]}, {"name": "tests.algorithm_table:model"})
"""Models of the clients' own, for the algorithms that ask for them: one wider than the shared one, one just like it."""
TRANSFER: dict[str, Any] = {"public_epochs": 2, "public_batch_size": 16, "private_epochs": 2, "private_batch_size": 8}

ROWS: tuple[Row, ...] = (
    Row("fedavg", {"name": "fedavg"}, model_both_ways),
    Row("fedavg-uniform", {"name": "fedavg", "weighting": "uniform", "server_lr": 0.7}, model_unweighted),
    Row("fedprox", {"name": "fedprox", "mu": 0.5}, model_both_ways),
    Row("scaffold", {"name": "scaffold"}, scaffold_naive, stateful=True),
    Row("scaffold-option1", {"name": "scaffold", "option": "I"}, scaffold_naive, stateful=True),
    Row("scaffold-derived", {"name": "scaffold", "payload": "derived"}, scaffold_derived, stateful=True, local=STEPS),
    Row("feddyn", {"name": "feddyn", "alpha": 0.1}, model_unweighted, stateful=True),
    Row("feddyn-adaptive", {"name": "feddyn", "alpha": 0.1, "adaptive": True}, model_unweighted, stateful=True),
    Row("fedftg", FEDFTG, with_class_counts(model_both_ways), sends_statistics=True),
    Row("fedftg-paper", FEDFTG | {"variant": "paper"}, with_class_counts(model_both_ways), sends_statistics=True),
    Row(
        "fedftg-fedprox",
        FEDFTG | {"base": {"name": "fedprox", "mu": 0.5}},
        with_class_counts(model_both_ways),
        sends_statistics=True,
    ),
    Row(
        "fedftg-feddyn",
        FEDFTG | {"base": "feddyn"},
        with_class_counts(model_unweighted),
        stateful=True,
        sends_statistics=True,
    ),
    Row(
        "fedftg-scaffold",
        FEDFTG | {"base": "scaffold"},
        with_class_counts(scaffold_naive),
        stateful=True,
        sends_statistics=True,
        tree_tolerance=1e-2,  # Adam makes steps of what is rounding, as of a bias before a batch normalisation
    ),
    Row("fd", {"name": "fd", "weight": 0.1}, fd(True), stateful=True, evaluates="clients"),
    Row("fd-paper", {"name": "fd", "variant": "paper", "weight": 0.1}, fd(False), stateful=True, evaluates="clients"),
    Row(
        "fd-broadcast",
        {"name": "fd", "exchange": "broadcast", "weighting": "count", "average": "logits", "loss": "kl"},
        fd_broadcast,
        stateful=True,
        evaluates="clients",
    ),
    Row("faug-fd", FAUG | {"base": {"name": "fd", "weight": 0.1}}, faug(fd(True)), stateful=True, evaluates="clients"),
    Row(
        "faug-fedavg",
        FAUG | {"base": "fedavg"},
        faug(model_both_ways),
        stateful=True,
        local=STEPS,  # more samples are no more steps, which would magnify rounding
    ),
    Row("feddistill", {"name": "feddistill"}, feddistill(False), stateful=True, evaluates="clients"),
    Row(
        "feddistill-recommended",
        {"name": "feddistill", "variant": "recommended"},
        feddistill(True),
        stateful=True,
        evaluates="clients",
    ),
    Row(
        "feddistill-plus",
        {"name": "feddistill_plus"},
        lambda sizes, round_: model_both_ways(sizes, round_) | feddistill(False)(sizes, round_),
        stateful=True,
    ),
    Row(
        "fedkd",
        {"name": "fedkd"},
        fedkd,
        stateful=True,
        evaluates="both",
        changes={"client_models": MENTORS},
    ),
    Row(
        "fedkd-official",
        {"name": "fedkd", "variant": "official", "projection": True, "weighting": "examples"},
        fedkd_weighted,
        stateful=True,
        evaluates="both",
        local=ADAM,
        changes={"client_models": MENTORS},
    ),
    Row(
        "fedmd",
        {"name": "fedmd", "subset_size": 20, "digest_batch_size": 8},
        fedmd,
        stateful=True,
        evaluates="clients",
        changes={"data": PUBLIC},
    ),
    Row(
        "fedmd-weighted",
        {"name": "fedmd", "subset_size": 20, "digest_batch_size": 8, "variant": "official", "weights": [1.0, 0.5]},
        fedmd_weighted,
        stateful=True,
        evaluates="clients",
        local=ADAM | {"head_decay": 0.01},
        changes={"data": PUBLIC, "transfer": TRANSFER | {"private_validation": 0.2}},
    ),
    Row("fedgen", FEDGEN, fedgen),
    Row("fedgen-paper", FEDGEN | {"variant": "paper"}, fedgen_unweighted),
    Row("fedgen-head", FEDGEN | {"share": "head"}, fedgen_head, stateful=True, evaluates="clients"),
    Row("fedensemble", {"name": "fedensemble"}, model_both_ways, sends_statistics=True),
    Row("feddf", FEDDF, model_both_ways, sends_statistics=True, changes={"data": PUBLIC}),
    Row("local", {"name": "local"}, nothing, stateful=True, evaluates="clients"),
    Row("pooled", {"name": "pooled"}, nothing, stateful=True, evaluates="clients"),
)


# --- a small federation -----------------------------------------------------------------------------------------------
def job_of(row: Row | Mapping[str, Any], **changes: Any) -> Job:
    """The job of a row (or of an `[algorithm]` table); `changes` are top-level keys, in place of the ones below."""
    algorithm, local = (row.table, row.local) if isinstance(row, Row) else (row, {})
    document: dict[str, Any] = {
        "rounds": ROUNDS,
        "clients": CLIENTS,
        "participation": PARTICIPANTS,
        "device": "cpu",
        "algorithm": dict(algorithm),
        "model": {"name": "tests.algorithm_table:model"},
        "data": DATA,
        "local": dict(local or LOCAL),
        "checkpoint": {"every_rounds": 0},
    }
    if isinstance(row, Row):
        document |= row.changes
    document |= changes
    return Job.from_canonical(json.dumps(document))


@dataclass
class Outcome:
    """What a run leaves, of all its ranks together."""

    server: State
    clients: dict[int, State]
    rows: list[dict[str, Any]]
    ledger: list[list[Any]]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of server and clients by its path."""
        return dict(leaves({"server": self.server, "clients": {str(c): s for c, s in sorted(self.clients.items())}}))

    def metrics(self) -> list[dict[str, Any]]:
        """The rows without what depends on the machine or the number of ranks: seconds, and bytes handed to MPI."""
        return [
            {name: value for name, value in row.items() if name not in ("seconds", "bytes")}
            | {"logical": row["bytes"]["logical"]}
            for row in self.rows
        ]

    def logical(self) -> dict[tuple[int, str], int]:
        """Logical bytes by round and "direction.kind"."""
        totals: dict[tuple[int, str], int] = {}
        for round_, _, direction, kind, _, size, *_ in self.ledger:
            if size:
                totals[round_, f"{direction}.{kind}"] = totals.get((round_, f"{direction}.{kind}"), 0) + size
        return totals


def run(
    job: Job,
    folder: Path,
    ranks: int = 1,
    resume: bool = False,
    prepare: Callable[[Engine], None] = lambda engine: None,
    hosts: Sequence[str] | None = None,
) -> Outcome:
    """Train a job on ranks that are threads, checkpoints in `folder`; `prepare(engine)` is called before round 1.

    `hosts`, by rank: the nodes on which they pretend to be.
    """

    def rank_main(comm: Communicator) -> Engine:
        engine = engine_of(job, comm, folder, resume)
        prepare(engine)
        assert engine.run()
        return engine

    engines = run_ranks(ranks, rank_main, hosts)
    clients = {client: state for engine in engines for client, state in engine.store.items()}
    root = engines[0]
    return Outcome(root.server or {}, clients, root.records.rows, root.records.ledger.rows())


def engine_of(job: Job, comm: Communicator, folder: Path, resume: bool = False) -> Engine:
    """An engine before its first round, or, with `resume`, after the newest checkpoint in `folder`."""
    checkpoints = Checkpoints(folder / "checkpoints", job.checkpoint.keep, comm, job.resume_sha256)
    store = ClientStore(job.client_state_mb * 1_000_000, folder / "scratch" / str(comm.rank))
    engine = Engine(Federation.build(job, comm), checkpoints, store)
    found = checkpoints.newest() if resume else None
    assert (found is not None) == resume
    if found is None:
        engine.begin()
    else:
        engine.restore(found)
    return engine


def with_changes(job: Job, *overrides: str) -> Job:
    """The same job with `key=value` overrides."""
    return load(job.to_toml(), overrides)


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Equal names, shapes, dtypes and bytes."""
    assert list(one) == list(other)
    for name, tensor in one.items():
        twin = other[name]
        assert (tensor.dtype, tensor.shape) == (twin.dtype, twin.shape), name
        as_bytes = [value.contiguous().reshape(-1).view(torch.uint8) for value in (tensor, twin)]
        assert torch.equal(*as_bytes), f"{name} differs"
