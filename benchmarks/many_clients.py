"""A thousand clients on three ranks: does a long run keep its memory and its open files?

usage: python benchmarks/many_clients.py [--rounds 200] [--checkpoint-every 50] [--limit-mb 950]

SCAFFOLD with 1,000 clients of which 10 take part in a round, a network of 190,410 parameters on small synthetic
samples. A client's control variate is 0.76 MB, so all of them are 760 MB; `client_state_mb = 50` lets each of the two
ranks that train hold 65, and the others go to scratch files and come back. Every ten rounds the benchmark reads, from
/proc, what each rank holds.

Required, of every rank: highest resident memory (VmHWM) at most `--limit-mb`; over the last three quarters of the run,
a straight line through the resident memory (VmRSS) rises by at most 5 MB per 100 rounds; no more open files in the
second half than in the first. `--rounds 500` is the soak. Exit code 1 where something does not hold.

Some 300 MB of a rank are the libraries, and as many their data: torch with CUDA, imported and idle. Also printed: size
and seconds of the checkpoints, which hold a state of every client that has taken part so far.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from processes import descriptors, follow, memory, mpifed, ranks

RANKS = 3
READ_EVERY = 10  # rounds
RISE = 5.0  # MB per 100 rounds


@dataclass(frozen=True)
class Reading:
    """One rank after a round: MB resident now and at its highest, open files."""

    round: int
    resident: float
    highest: float
    files: int


def overrides(rounds: int, checkpoint_every: int, out: Path) -> list[str]:
    return [
        "seed=0",
        f"rounds={rounds}",
        "clients=1000",
        "participation=10",
        "client_state_mb=50",
        "algorithm.name=scaffold",
        "model.name=mlp",
        "model.hidden=[400, 400]",
        "data.name=synthetic",
        "data.samples=20000",
        "data.input_shape=[1, 8, 8]",
        "data.partition.name=iid",
        "local.epochs=1",
        "local.batch_size=10",
        "local.lr=0.01",
        "evaluate.every_rounds=10",
        f"checkpoint.every_rounds={checkpoint_every}",
        "device=cpu",
        f"out={out}",
    ]


def line(readings: list[Reading]) -> float:
    """Slope of the resident memory over the last three quarters of the readings, in MB per 100 rounds."""
    late = readings[len(readings) // 4 :]
    return 100 * float(np.polyfit([r.round for r in late], [r.resident for r in late], 1)[0])


def halves(readings: list[Reading]) -> tuple[list[Reading], list[Reading]]:
    """The first half of the readings and the second."""
    return readings[: len(readings) // 2], readings[len(readings) // 2 :]


def report(of_rank: dict[int, list[Reading]], limit: float) -> list[str]:
    """Print the table; what does not hold."""
    missed = []
    print(
        "\n| rank | MB at round | " + " | ".join(["MB at the end", "highest MB", "MB per 100 rounds", "files"]) + " |"
    )
    print("|---|---|---|---|---|---|")
    for rank, readings in of_rank.items():
        first, last = readings[len(readings) // 4], readings[-1]
        slope, highest = line(readings), max(reading.highest for reading in readings)
        # a rank may be reading or writing a client's state just now, so the lowest count of several readings
        early, late = (min(reading.files for reading in half) for half in halves(readings))
        print(
            f"| {rank} | {first.resident:.0f} at {first.round} | {last.resident:.0f} | {highest:.0f} | {slope:+.2f} | "
            f"{early} to {late} |"
        )
        if highest > limit:
            missed.append(f"rank {rank}: {highest:.0f} MB are above {limit:g}")
        if slope > RISE:
            missed.append(f"rank {rank}: resident memory rises by {slope:.1f} MB per 100 rounds")
        if late > early:
            missed.append(f"rank {rank}: {early} open files in the first half and {late} in the second")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--checkpoint-every", type=int, default=50, help="rounds")
    parser.add_argument("--limit-mb", type=float, default=950.0)
    parser.add_argument("--folder", type=Path, help="where the run folder is made; by default the temporary folder")
    args = parser.parse_args()
    if args.rounds < 4 * READ_EVERY:
        parser.error(f"--rounds: at least {4 * READ_EVERY}")

    folder = Path(tempfile.mkdtemp(prefix="mpifed-clients-", dir=args.folder))
    run = folder / "run"
    of_rank: dict[int, list[Reading]] = {rank: [] for rank in range(RANKS)}
    rows, began = [], time.monotonic()
    command = mpifed(RANKS, overrides(args.rounds, args.checkpoint_every, run))
    for row in follow([command], run / "metrics.jsonl", folder / "log", 3600.0):
        rows.append(row)
        if row["round"] % READ_EVERY == 0 and row["round"] < args.rounds:
            for rank, pid in ranks(row["pids"]).items():
                of_rank[rank].append(Reading(row["round"], *memory(pid), descriptors(pid)))
        if row["seconds"]["checkpoint"]:
            newest = max((run / "checkpoints").glob("round_??????"), default=None)
            size = sum(file.stat().st_size for file in newest.iterdir()) / 1e6 if newest else 0.0
            print(
                f"round {row['round']:4d}: checkpoint {size:6.0f} MB in {row['seconds']['checkpoint']:.2f} s",
                flush=True,
            )
    seconds = statistics.median(row["seconds"]["total"] for row in rows[1:])
    shutil.rmtree(folder)
    missed = report(of_rank, args.limit_mb)
    print(f"\n{args.rounds} rounds in {time.monotonic() - began:.0f} s, {seconds:.3f} s a round (median)")
    print("\n".join(missed) if missed else "memory and open files stay")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
