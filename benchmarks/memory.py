"""What a data set costs the memory of a node: one copy for all its ranks, or a copy each.

    python benchmarks/memory.py [--ranks 8] [--data mnist mnist_in_memory cifar10] [--participation 1.0 0.5]

Each case starts an `mpirun` whose ranks set up a job and use the data as two rounds would: every rank takes the samples
of its clients, and rank 0 (with `local`, which tests on the clients, every rank) goes through the test set. What is
counted is the proportional set size of `/proc/self/smaps_rollup` (PSS: a page that n processes map counts 1/n in each,
so that a node's ranks add up to what they use together) after that, less what it was when everything but the data was
there. `in use` holds what a process keeps of freed memory for its next batch (a client's samples as float32, and a set
that was read and freed); `held` is without it. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import environment, mpifed

MB = 1e6


def mnist_in_memory(*, root: str = "") -> Any:
    """MNIST read into memory rather than mapped, as from files that cannot be mapped."""
    import numpy as np

    from mpifed.data.idx import mnist
    from mpifed.data.source import ArraySource

    source = mnist(root=root)
    return ArraySource(source.spec, **{name: np.array(array) for name, array in source.arrays().items()})


def noise(*, megabytes: int = 64) -> Any:
    """That many random bytes as samples of 1 kB, an eighth of them to test with, in memory; two classes."""
    import numpy as np

    from mpifed.data.source import ArraySource
    from mpifed.types import DataSpec

    samples = np.random.default_rng(0).integers(0, 256, (megabytes * 1000, 1, 20, 50), dtype=np.uint8)
    labels, tests = np.arange(len(samples)) % 2, len(samples) // 8
    return ArraySource(DataSpec((1, 20, 50), 2), samples[tests:], labels[tests:], samples[:tests], labels[:tests])


def pss() -> dict[str, int]:
    """This process's proportional and its own (unshared) memory, bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    return {"pss": sizes["Pss"], "private": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def on_a_rank(overrides: Sequence[str], out: Path) -> None:
    """Set a job up, use its data, and write what that took to `out`: a list by rank of `pss()` before, after, and
    after freed memory was handed back."""
    from mpifed.memory import keep_freed_memory, return_freed_memory

    keep_freed_memory()
    import torchvision.datasets  # noqa: F401  (so that its own memory is there before the data)

    from mpifed.comm.mpi import world
    from mpifed.federation.federation import Federation
    from mpifed.job import load

    comm = world()
    tiny = load(None, ["data.name=synthetic", "data.samples=500", "algorithm.name=fedavg"], "the small job")
    Federation.build(tiny, comm).settle()
    job = load(None, ["data.partition.name=iid", *overrides], "the job")
    gc.collect()
    comm.barrier()
    before = pss()
    comm.barrier()
    federation = Federation.build(job, comm)
    federation.settle()
    for round_ in (1, 2):
        dealt = federation.roster.deal(federation.roster.sample(round_)).by_rank[comm.rank]
        for client in dealt:
            federation.samples(client)
        on_clients = federation.algorithm.evaluates != "server"
        if comm.rank in federation.roster.hosts if on_clients else comm.rank == 0:
            for batch in federation.test_set[0].split(512):
                federation.env.spec.standardise(batch)
    gc.collect()
    comm.barrier()
    after = pss()
    comm.barrier()
    return_freed_memory()
    comm.barrier()
    held = pss()
    comm.barrier()
    parts = comm.gather_bytes(json.dumps({"before": before, "after": after, "held": held}).encode())
    if parts is not None:
        out.write_text(json.dumps([json.loads(part) for part in parts]))


def measure(ranks: int, overrides: Sequence[str], out: Path, seconds: float = 300) -> list[dict[str, dict[str, int]]]:
    """Run `on_a_rank` on that many; what each of them wrote."""
    command = mpifed(ranks, [])
    start = command[: command.index("-m")]
    done = subprocess.run(
        [*start, "-m", "benchmarks.memory", "--rank", str(out), *overrides],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if done.returncode:
        raise SystemExit(f"{overrides} failed:\n{done.stdout}{done.stderr[-3000:]}")
    found: list[dict[str, dict[str, int]]] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--data", nargs="+", default=["mnist", "mnist_in_memory", "cifar10"])
    parser.add_argument("--participation", nargs="+", default=["1.0", "0.5"])
    parser.add_argument("--algorithm", nargs="+", default=["fedavg", "local"])
    parser.add_argument("--share", nargs="+", default=["auto", "off"])
    arguments = parser.parse_args()
    folder = tempfile.TemporaryDirectory(prefix="mpifed-memory-")
    out = Path(folder.name) / "ranks.json"
    print(
        "| data | algorithm | participation | data.share | in use, together | held, together | held, rank 0 | others |"
    )
    print("|---|---|---|---|---|---|---|---|")
    cases = itertools.product(arguments.data, arguments.algorithm, arguments.participation, arguments.share)
    for name, algorithm, participation, share in cases:
        source = f"benchmarks.memory:{name}" if name in ("mnist_in_memory", "noise") else name
        keys = ["clients=40", f"data.name={source}", f"participation={participation}", f"data.share={share}"]
        found = measure(arguments.ranks, [*keys, f"algorithm.name={algorithm}"], out)
        used, held = (
            [(rank[when]["pss"] - rank["before"]["pss"]) / MB for rank in found] for when in ("after", "held")
        )
        together = (
            f"{sum(used):.0f} MB | {sum(held):.0f} MB | {held[0]:.0f} | {min(held[1:]):.0f} to {max(held[1:]):.0f}"
        )
        print(f"| {name} | {algorithm} | {participation} | {share} | {together} |", flush=True)
    folder.cleanup()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        on_a_rank(sys.argv[3:], Path(sys.argv[2]))
    else:
        main()
