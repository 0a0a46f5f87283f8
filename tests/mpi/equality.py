"""The same results on any number of ranks: the jobs that are compared, how they are run, and what is compared.

All jobs of one number of ranks share one `mpirun`, in which `mpifed.run.main` is called once for each, as
`python -m mpifed.run` calls it. What a run leaves is read from its run folder. `test_equality.py` compares a sample of
the numbers of ranks, `benchmarks/equality.py` all of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mpifed.comm.inprocess import InProcess
from mpifed.job import Job, load
from mpifed.storage.checkpoint import Checkpoints
from mpifed.storage.run_folder import RunFolder
from tests.algorithm_table import ROWS, Outcome, job_of, with_changes
from tests.launch import run_ranks

TREE_TOLERANCE = 1e-6
"""Largest relative distance (norm of the difference over the norm) of `reduce = "tree"` from `"ordered"`."""


def tolerance(name: str) -> float:
    """That of a case: of its row, where the row has one of its own."""
    return next((row.tree_tolerance for row in ROWS if row.id == name and row.tree_tolerance), TREE_TOLERANCE)


STOPPED_AFTER, STOPPED_ON = 2, 3
"""Round after which runs are stopped that are then resumed, and the number of ranks that computed it."""

SECONDS_PER_RUN = 30  # of the time limit: many times what one takes, also on a busy machine


def cases() -> dict[str, Job]:
    """Jobs by name: every algorithm of the table, and what else could depend on where a client is trained."""
    rows = {row.id: job_of(row) for row in ROWS}
    fedavg, scaffold, feddyn = rows["fedavg"], rows["scaffold"], rows["feddyn"]
    images = ("data.input_shape=[1, 12, 12]", "data.samples=60")
    return rows | {
        "fedavg, buffers local": with_changes(fedavg, "model.buffers=local"),
        "scaffold, buffers local": with_changes(scaffold, "model.buffers=local"),
        "fedavg, codec half": with_changes(fedavg, "codec=half"),
        "scaffold, codec half": with_changes(scaffold, "codec=half"),
        "fedavg, codec svd both ways": with_codecs(
            fedavg, {"down.model": "svd(energy=0.8)", "up.update": "svd(energy=0.7)"}
        ),
        "fedkd, codec svd both ways": with_codecs(
            rows["fedkd"], {"down.update": "svd(energy=0.8)", "up.update": "svd(energy=0.7)"}
        ),
        "fedavg, codec powersgd": with_codecs(fedavg, {"up.update": "powersgd(rank=1, min_rate=1.0)"}),
        "scaffold, codec topk": with_codecs(
            scaffold, {"up.update": "topk(fraction=0.3)", "up.control_update": "topk(fraction=0.3)"}
        ),
        "feddyn, codec quantize": with_changes(feddyn, "codec=quantize(bits=4)"),
        "fedavg, everybody": with_changes(fedavg, "participation=1.0"),
        "feddyn, everybody": with_changes(feddyn, "participation=1.0"),
        "fedavg, bernoulli": with_changes(fedavg, "sampling=bernoulli"),
        "fedavg, by examples": with_changes(fedavg, "sampling=examples"),
        "scaffold, 12 clients": with_changes(scaffold, "clients=12", "data.samples=360", "participation=7"),
        "fedavg, adam": with_changes(fedavg, "local.momentum=0.0", "local.optimizer=adam", "local.lr=0.01"),
        "fedavg, cnn": with_changes(fedavg, "model.name=cnn", "model.hidden=16", *images),
        "scaffold, fedgen_net": with_changes(scaffold, "model.name=fedgen_net", *images),
        "scaffold, states on disk": with_changes(scaffold, "client_state_mb=0"),
    }


def with_codecs(job: Job, codecs: Mapping[str, str]) -> Job:
    """The job with these codecs by field."""
    return with_changes(job, *(f"codec.{field}={codec}" for field, codec in codecs.items()))


# --- running ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Runs:
    """The runs of all jobs: in one order of addition and in MPI's, and stopped on three ranks and resumed on others."""

    folder: Path
    jobs: Mapping[str, Job]
    ordered: Sequence[int]
    """Numbers of ranks; the first is the one that the others are compared with."""
    tree: Sequence[int]
    resumed: Sequence[int]

    def train(self, progress: Callable[[str], None] = lambda line: None) -> None:
        """Run everything, in one launch for each number of ranks."""
        rounds = next(iter(self.jobs.values())).rounds
        stopped = {name: with_changes(job, f"rounds={STOPPED_AFTER}") for name, job in self.jobs.items()}
        summed = {name: with_changes(job, "reduce=tree") for name, job in self.jobs.items()}
        progress(f"{STOPPED_ON} ranks, stopped after round {STOPPED_AFTER}")
        run_all(STOPPED_ON, _fresh(stopped, self.folder / "stopped"))
        for ranks in self.resumed:
            shutil.copytree(self.folder / "stopped", self._of("resumed", ranks))
        for ranks in sorted({*self.ordered, *self.tree, *self.resumed}):
            commands = []
            if ranks in self.ordered:
                commands += _fresh(self.jobs, self._of("ordered", ranks))
            if ranks in self.tree:
                commands += _fresh(summed, self._of("tree", ranks))
            if ranks in self.resumed:
                commands += _resumed(self.jobs, self._of("resumed", ranks), rounds)
            progress(f"{ranks} ranks, {len(commands)} runs")
            run_all(ranks, commands)

    def outcome(self, way: Literal["ordered", "tree", "resumed"], ranks: int, name: str) -> Outcome:
        """What the run of a job left."""
        return outcome(self._of(way, ranks) / name)

    def reference(self, name: str) -> Outcome:
        """What the others are compared with."""
        return self.outcome("ordered", self.ordered[0], name)

    def _of(self, way: str, ranks: int) -> Path:
        return self.folder / f"{way}-{ranks}"


def run_all(ranks: int, commands: Sequence[Sequence[str]]) -> None:
    """All command lines in one launch; every rank ends each with exit code 0."""
    limit = 60 + SECONDS_PER_RUN * len(commands)
    codes = run_ranks("tests.mpi.equality:train", ranks, timeout=limit, arguments={"commands": commands})
    assert codes == [[0] * len(commands)] * ranks, codes


def train(commands: Sequence[Sequence[str]]) -> list[int]:
    """On every rank: the exit code of `python -m mpifed.run` for each command line, one after another."""
    from mpifed.run import main

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return [main(command) for command in commands]


def _fresh(jobs: Mapping[str, Job], folder: Path) -> list[list[str]]:
    """Command lines that run each job into `folder/<name>`."""
    folder.mkdir(parents=True)
    commands = []
    for name, job in jobs.items():
        file = folder / f"{name}.toml"
        file.write_text(job.to_toml())
        commands.append([str(file), f"out={folder / name}"])
    return commands


def _resumed(names: Iterable[str], folder: Path, rounds: int) -> list[list[str]]:
    """Command lines that go on with the runs in `folder` until `rounds`."""
    return [["--resume", str(folder / name), f"rounds={rounds}"] for name in names]


# --- what a run leaves ------------------------------------------------------------------------------------------------
def outcome(path: Path) -> Outcome:
    """States and ledger of a run's last checkpoint, and its metrics."""
    folder = RunFolder.open(path)
    assert folder.complete, f"{path} is not complete"
    job = load(folder.job.read_text(), source=str(folder.job))
    found = Checkpoints(folder.checkpoints, 2, InProcess.alone(), job.resume_sha256).newest()
    assert found is not None and found.round == job.rounds
    states = {client: found.client(client) for client in sorted(found.clients)}
    return Outcome(found.server(), states, folder.read_metrics(), json.loads(found.records("ledger")))


def differences(one: Outcome, other: Outcome) -> list[str]:
    """What is not the same in both: tensors bit for bit, metrics without seconds, logical bytes."""
    left, right = one.tensors(), other.tensors()
    different = [f"{name} is only in one" for name in left.keys() ^ right.keys()]
    different += [name for name in left.keys() & right.keys() if not _same_bits(left[name], right[name])]
    if one.metrics() != other.metrics():
        different.append("metrics")
    if one.logical() != other.logical():
        different.append("logical bytes")
    return sorted(different)


def distance(one: Outcome, other: Outcome) -> float:
    """The largest, over server and clients, of |a - b| / |a|, all tensors of a state taken as one vector."""
    pairs = [(one.server, other.server), *((state, other.clients[client]) for client, state in one.clients.items())]
    distances = [0.0]
    for left, right in pairs:
        a, b = _vector(left), _vector(right)
        if a.numel():
            distances.append(float((a - b).norm() / a.norm()))
    return max(distances)


def _vector(state: Mapping[str, Tensor]) -> Tensor:
    tensors = Outcome(dict(state), {}, [], []).tensors().values()
    return torch.cat([torch.empty(0, dtype=torch.float64), *(tensor.double().reshape(-1) for tensor in tensors)])


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(left, right)
