"""What mpifed costs beside the same federated averaging written by hand, in one command.

usage: python benchmarks/overhead.py [--repetitions 5] [--rounds 10] [--cases ten hundred extra] [--data mnist]

The claim: the CNN of McMahan et al. (1,663,370 parameters) on MNIST, batches of 32, one local epoch of SGD, one thread
a process; seconds a round, of `mpirun -n N python -m mpifed.run` over those of a loop of two processes:

    ten      10 clients of 600 samples          -n 3 (two ranks train): at most 1.05     -n 11: at most 1.15
    hundred  100 clients of 60, 10 in a round   -n 3: at most 1.10
    extra    as ten, with a test and a checkpoint every round (no claim)

`hundred` is also run with `reduce = "tree"`, which adds as the loop does: on the process, then by a reduction.

The loop (`hand_written`) is what one would write without mpifed: a plain `nn.Module`, `torch.optim.SGD` on its
parameters with gradients set to none, samples standardised once and kept, clients dealt to the two processes in turn,
one gloo all-reduce of one flat vector a round. It knows no client failures, no ledger, no states, no resume. Both train
on the same samples in the same order from the same parameters, so their training losses have to agree, and are checked.

Runs alternate, mpifed and the loop in turn, and a ratio is of one repetition; the first round of each run is left out,
and so is everything before it. `seconds` is what the run itself measures (`seconds.total`; plus the checkpoint in
`extra`); `outside` is the time between two rounds' lines as seen by the benchmark, and `cpu` the processor time of all
processes of a run between them: on a busy machine the firmest of the three.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from processes import cpu_seconds, follow, mpifed

PROCESSES = 2  # of the hand-written loop
LOOP = "by hand"
SAME_LOSS = 1e-2  # relative, in rounds 1 to 3: the loop adds in float32 and another order, which training magnifies


@dataclass(frozen=True)
class Run:
    """One way to run a case with mpifed; `limit` of the ratio where one is claimed."""

    ranks: int
    limit: float | None = None
    reduce: str = "ordered"

    @property
    def name(self) -> str:
        return f"-n {self.ranks} {self.reduce}"


@dataclass(frozen=True)
class Case:
    """One federation, and the ways to run it with mpifed."""

    clients: int
    samples: int  # of each client
    participation: int
    runs: tuple[Run, ...]
    every: int = 0  # rounds between two tests and checkpoints

    def overrides(self, data: str, rounds: int, seed: int) -> list[str]:
        return [
            f"seed={seed}",
            f"rounds={rounds}",
            f"clients={self.clients}",
            f"participation={self.participation}",
            "algorithm.name=fedavg",
            "model.name=cnn",
            f"data.name={data}",
            "data.partition.name=overhead:few",
            f"data.partition.samples={self.samples}",
            "local.epochs=1",
            "local.batch_size=32",
            "local.lr=0.05",
            f"evaluate.every_rounds={self.every}",
            f"checkpoint.every_rounds={self.every}",
            "device=cpu",
        ]


CASES = {
    "ten": Case(10, 600, 10, (Run(3, 1.05), Run(11, 1.15))),
    "hundred": Case(100, 60, 10, (Run(3, 1.10), Run(3, 1.10, "tree"))),
    "extra": Case(10, 600, 10, (Run(3), Run(11)), every=1),
}


def few(
    labels: np.ndarray, clients: int, rng: np.random.Generator, test_labels: Any = None, *, samples: int = 600
) -> Any:
    """A partition: `samples` random ones for every client."""
    from mpifed.data.partition import Partition

    dealt = rng.permutation(len(labels))[: clients * samples].reshape(clients, samples)
    return Partition(tuple(np.sort(indices) for indices in dealt))


# --- the loop by hand -------------------------------------------------------------------------------------------------
def hand_written(overrides: list[str], process: int, folder: Path) -> None:
    """FedAvg over two processes. mpifed gives samples, partition and initial parameters; all else is here."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn

    from mpifed.comm.inprocess import InProcess
    from mpifed.federation.federation import Federation
    from mpifed.job import load
    from mpifed.rng import torch_generator

    job = load(None, overrides, "the benchmark")
    federation = Federation.build(job, InProcess.alone())
    standardise = federation.env.spec.standardise
    initial = federation.env.initial()[0]
    sampled = {round_: federation.roster.sample(round_) for round_ in range(1, job.rounds + 1)}
    mine = {client for clients in sampled.values() for client in clients[process::PROCESSES]}
    data = {}
    for client in mine:
        x, y = federation.source.take("train", federation.partition.train[client])
        data[client] = standardise(x), y
    test_x, test_y = federation.test_set
    test_x, test_y = standardise(test_x[process::PROCESSES]), test_y[process::PROCESSES]
    test_samples = len(federation.test_set[1])

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder.absolute() / 'meeting'}", rank=process, world_size=PROCESSES
    )
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=job.local.lr)
    # the global model, and the sum of the trained ones with the sums of their weights and losses at the end
    globally, total = initial.clone(), torch.zeros(initial.numel() + 2)
    sizes = [parameter.numel() for parameter in parameters]
    shapes = [parameter.shape for parameter in parameters]
    start = [part.view(shape) for part, shape in zip(globally.split(sizes), shapes, strict=True)]
    sums = [part.view(shape) for part, shape in zip(total[:-2].split(sizes), shapes, strict=True)]

    for round_ in range(1, job.rounds + 1):
        began = time.perf_counter()
        total.zero_()
        for client in sampled[round_][process::PROCESSES]:
            x, y = data[client]
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
            model.train()
            losses, batches = torch.zeros(()), 0
            order = torch.randperm(len(y), generator=torch_generator(job.seed, "batches", round_, client))
            for batch in order.split(job.local.batch_size):
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                optimizer.step()
                losses += loss.detach()
                batches += 1
            with torch.no_grad():
                for added, parameter in zip(sums, parameters, strict=True):
                    added.add_(parameter, alpha=len(y))
            total[-2] += len(y)
            total[-1] += losses / batches
        dist.all_reduce(total)
        globally.copy_(total[:-2] / total[-2])

        row = {"round": round_, "train_loss": float(total[-1]) / len(sampled[round_])}
        if job.evaluate.every_rounds:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
                model.eval()
                pieces = zip(test_x.split(1000), test_y.split(1000), strict=True)
                correct = sum((model(x).argmax(1) == y).sum() for x, y in pieces)
            counted = torch.as_tensor(correct, dtype=torch.float64)
            dist.all_reduce(counted)
            row["accuracy"] = float(counted) / test_samples
        if process == 0:
            if job.checkpoint.every_rounds:
                torch.save(dict(zip(model.state_dict(), start, strict=True)), folder / "model.pt")
            row["seconds"] = time.perf_counter() - began
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


# --- measuring --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Measured:
    """One run: seconds a round, first left out, and the training loss of every round."""

    seconds: float
    outside: float
    cpu: float
    losses: list[float]


def measure(run: Run | None, overrides: list[str], patience: float) -> Measured:
    """One run of mpifed or, for None, of the loop."""
    folder = Path(tempfile.mkdtemp(prefix="mpifed-overhead-"))
    out = folder / "run"
    if run is None:
        out.mkdir()
        commands = [
            [sys.executable, __file__, "loop", str(process), str(out), *overrides] for process in range(PROCESSES)
        ]
    else:
        commands = [mpifed(run.ranks, [*overrides, f"reduce={run.reduce}", f"out={out}"])]
    rows, moments, cpu = [], [], []
    for row in follow(commands, out / "metrics.jsonl", folder / "log", patience):
        moments.append(row["at"])
        cpu.append(cpu_seconds(row["pids"]))
        seconds = row["seconds"]
        rows.append(row | {"seconds": seconds if run is None else seconds["total"] + seconds["checkpoint"]})
    shutil.rmtree(folder)
    # the last line comes with what ends a run: its test, its checkpoint, its record
    spans = len(rows) - 2
    return Measured(
        statistics.mean(row["seconds"] for row in rows[1:-1]),
        (moments[-2] - moments[0]) / spans,
        (cpu[-2] - cpu[0]) / spans,
        [row["train_loss"] for row in rows],
    )


Results = dict[str, list[Measured]]
"""The runs of a case by name, one a repetition."""


def repeat(case: Case, repetitions: int, data: str, rounds: int, patience: float) -> Results:
    """Alternating runs: the loop stands between the runs of mpifed that it is compared with."""
    order: list[Run | None] = [case.runs[0], None, *case.runs[1:]]
    names = [LOOP, *(run.name for run in case.runs)]
    results: Results = {name: [] for name in names}
    for repetition in range(repetitions):
        for run in order:
            measured = measure(run, case.overrides(data, rounds, repetition), patience)
            name = LOOP if run is None else run.name
            results[name].append(measured)
            seconds = f"{measured.seconds:7.3f} s  outside {measured.outside:7.3f} s  cpu {measured.cpu:7.3f} s"
            losses = f"{measured.losses[0]:.4f} -> {measured.losses[-1]:.4f}"
            print(f"  repetition {repetition + 1}  {name:13s} {seconds}  loss {losses}", flush=True)
    return results


def ratios(own: list[Measured], loop: list[Measured], column: str) -> list[float]:
    """One ratio a repetition."""
    return [getattr(a, column) / getattr(b, column) for a, b in zip(own, loop, strict=True)]


def loss_difference(own: list[Measured], loop: list[Measured]) -> float:
    """The largest relative difference of two training losses of the same seed, in the first rounds."""
    pairs = [pair for a, b in zip(own, loop, strict=True) for pair in zip(a.losses[:3], b.losses[:3], strict=True)]
    return max(abs(a - b) / b for a, b in pairs)


def spread(values: list[float]) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(name: str, case: Case, results: Results) -> Iterator[str]:
    """Rows of the table, the loop's first."""
    loop = results[LOOP]
    for kind, own in results.items():
        run = next((run for run in case.runs if run.name == kind), None)
        cells = [name, kind, spread([one.seconds for one in own]), spread([one.cpu for one in own])]
        if run is None:
            cells += ["1", "1", "1", "", ""]
        else:
            cells += [spread(ratios(own, loop, column)) for column in ("seconds", "outside", "cpu")]
            cells += ["" if run.limit is None else f"{run.limit:.2f}", f"{loss_difference(own, loop):.0e}"]
        yield "| " + " | ".join(cells) + " |"


def misses(name: str, case: Case, results: Results) -> Iterator[str]:
    """What does not hold: a limit, or equal losses."""
    loop = results[LOOP]
    for run in case.runs:
        own = results[run.name]
        ratio = statistics.median(ratios(own, loop, "seconds"))
        if run.limit is not None and ratio > run.limit:
            yield f"{name}, {run.name}: ratio {ratio:.3f} is above {run.limit}"
        if loss_difference(own, loop) > SAME_LOSS:
            yield f"{name}, {run.name}: the losses are not those of the loop"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10, help="of every run; two of them are not counted")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--data", default="mnist" if os.environ.get("MPIFED_DATA") else "synthetic")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds after which one run counts as hung")
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error("--rounds: at least 3")
    began = time.monotonic()
    results = {}
    for name in args.cases:
        print(f"{name} ({args.data}, {args.rounds} rounds)", flush=True)
        results[name] = repeat(CASES[name], args.repetitions, args.data, args.rounds, args.patience)
    print("\n| case | run | seconds a round | cpu seconds a round | ratio | outside | cpu | limit | loss |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.cases:
        print("\n".join(table(name, CASES[name], results[name])))
    print(f"\n{time.monotonic() - began:.0f} s, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} (5 minutes)")
    missed = [line for name in args.cases for line in misses(name, CASES[name], results[name])]
    print("\n".join(missed) if missed else "all limits hold")
    return 1 if missed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["loop"]:
        hand_written(sys.argv[4:], int(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
