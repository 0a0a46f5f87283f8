"""Predicted and measured seconds of a round over several hosts, of jobs that the fit has not seen.

usage:  python -m benchmarks.predict [--hosts 2 4] [--mbit 50 200] [--rounds 6] [--jobs NAME ...]

The hosts are those of `benchmarks.hosts`: network namespaces with shaped links, one rank on each, MPICH over TCP. On
them `mpifed probe` measures the collectives, with one job. Then every other job is tried out by itself on one rank, as
`mpifed predict` does, and its rounds are predicted; and then it is run. All hosts are one machine, and so share its
cores; how much ranks on all cores disturb each other is measured by a probe on as many ranks as there are cores.

Required: the median of the measured rounds, but the first, within 25 % of the prediction; bytes as predicted, exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.hosts import hosts, launch_module
from mpifed.federation.federation import Federation
from mpifed.job import load
from mpifed.memory import keep_freed_memory
from mpifed.predict.compute import Compute
from mpifed.predict.measured import Probe
from mpifed.predict.prediction import Prediction, predict
from mpifed.predict.probe import cores
from mpifed.predict.timeline import Cores
from mpifed.predict.trial import try_out
from mpifed.report.layout import aligned
from mpifed.storage.run_folder import RunFolder
from tests.launch import ROOT, mpirun

COMMON = ["evaluate.every_rounds=0", "checkpoint.every_rounds=0", "turns=off", "measure_wire=off", "device=cpu"]
SEEN = [
    *("algorithm.name=fedavg", "clients=10", "model.name=mlp", "model.hidden=[2000]", "local.steps=20"),
    *("data.partition.name=dirichlet", "data.partition.alpha=0.5"),
]
"""What the probe measures: FedAvg on the handwritten digits, 150,010 parameters."""
IMAGES = ["data.name=synthetic", "data.samples=4000", "data.test_samples=500", "data.input_shape=[1, 28, 28]"]
JOBS = {
    "FedAvg, CNN, 10 of 40": [
        *(*IMAGES, "algorithm.name=fedavg", "clients=40", "participation=10", "model.name=cnn", "local.epochs=1"),
        *("data.partition.name=dirichlet", "data.partition.alpha=0.5", "local.lr=0.05"),
    ],
    "FedAvg, MLP, tree": [
        *("algorithm.name=fedavg", "clients=12", "model.name=mlp", "model.hidden=[6000]", "reduce=tree"),
        *("data.partition.name=dirichlet", "data.partition.alpha=0.3", "local.steps=40", "local.batch_size=16"),
    ],
    "FedMD, 8 unequal": [
        *("algorithm.name=fedmd", "algorithm.subset_size=400", "data.public_held_out=0.3", "clients=8"),
        *("model.name=mlp", "model.hidden=[512]", "local.epochs=5", "data.partition.name=dirichlet"),
        "data.partition.alpha=0.3",
    ],
    "FedGen, 20 clients": [
        *("algorithm.name=fedgen", "clients=20", "model.name=mlp", "model.hidden=[800]", "local.epochs=4"),
        *("data.partition.name=dirichlet", "data.partition.alpha=0.5"),
    ],
    "FedFTG, 5 of 10": [
        *("algorithm.name=fedftg", "algorithm.channels=16", "algorithm.iterations=4", "clients=10"),
        *("participation=0.5", "model.name=mlp", "model.hidden=[1500]", "local.epochs=4"),
    ],
    "FedKD, SVD": [
        *("algorithm.name=fedkd", 'client_models=[{name = "mlp", hidden = [64]}]', "clients=6", "local.epochs=4"),
        *("model.name=mlp", "model.hidden=[1500]", 'codec={"up.update" = "svd", "down.update" = "svd"}'),
    ],
}
WITHIN = 1.25


def rank_main(jobs: Sequence[Sequence[str]]) -> int:
    """On every rank: all jobs, one after the other."""
    from mpifed.run import main as run

    return max(run(job) for job in jobs)


def contention(folder: Path) -> float:
    """How much longer training takes on a core when all cores train."""
    path, _ = mpirun()
    out = folder / "local.json"
    command = [path, "-n", str(cores()), sys.executable, "-m", "mpifed", "probe", *SEEN, *COMMON, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--seconds", "3"], check=True, env=environment, stdout=subprocess.DEVNULL, timeout=120)
    return Probe.read(out).contention


def foretell(words: Sequence[str], ranks: int, probe: Probe, disturbed: float, compute: Compute) -> Prediction:
    """The prediction of a job on hosts of one rank each, which share this machine's cores."""
    federation = Federation.planned(load(None, list(words), "job"), [f"host{rank}" for rank in range(ranks)])
    shared = Cores(["machine"] * ranks, cores(), disturbed, turns=False)
    return predict(federation, compute, probe.network, shared)


def compare(name: str, foretold: Prediction, folder: RunFolder, failed: list[str]) -> tuple[str, ...]:
    """A row of the table; what is required and not so goes to `failed`."""
    rows = folder.read_metrics()
    later = rows[1:]
    measured = statistics.median(row["seconds"]["total"] for row in later)
    ratio = measured / foretold.later_rounds
    least, most = foretold.in_all.total()
    logical = sum(sum(row["bytes"]["logical"].values()) for row in rows)
    exact = most is not None and least.logical <= logical <= most.logical
    if not exact:
        failed.append(f"{name}: {logical:,} logical bytes, but {least.logical:,} were predicted")
    if not 1 / WITHIN <= ratio <= WITHIN:
        failed.append(f"{name}: {measured:.3f} s a round, but {foretold.later_rounds:.3f} s were predicted")
    assert foretold.seconds is not None
    parts = [getattr(foretold.seconds, part) / foretold.rounds for part in ("train", "communicate", "server")]
    found = [statistics.median(row["seconds"][part] for row in later) for part in ("train", "communicate", "server")]
    both = [f"{one:.3f} / {other:.3f}" for one, other in zip(parts, found, strict=True)]
    return name, f"{foretold.later_rounds:.3f}", f"{measured:.3f}", f"{ratio:.2f}", *both, "yes" if exact else "NO"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mbit", type=float, nargs="+", default=[50, 200])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=tuple(JOBS))
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="of one launch")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.as_rank:
        return rank_main(json.loads(arguments.as_rank))
    keep_freed_memory()
    failed: list[str] = []
    words = {name: [f"rounds={arguments.rounds}", *COMMON, *JOBS[name]] for name in arguments.jobs}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        disturbed = contention(out)
        trials: Mapping[str, Compute] = {name: try_out(load(None, words[name], "job"), 3.0) for name in words}
        for count in arguments.hosts:
            for mbit in arguments.mbit:
                place = out / f"{count}-{mbit:g}"
                place.mkdir()
                with hosts(count, mbit) as where:
                    file = place / "probe.json"
                    launch_module(
                        where, 1, ["mpifed", "probe", *SEEN, *COMMON, "--seconds", "1", "--out", str(file)],
                        place / "probe.log", arguments.limit,
                    )  # fmt: skip
                    jobs = [[*said, f"out={place / str(number)}"] for number, said in enumerate(words.values())]
                    launch_module(
                        where, 1, ["benchmarks.predict", "--as-rank", json.dumps(jobs)], place / "log", arguments.limit
                    )
                probe = Probe.read(file)
                rows = []
                for number, name in enumerate(words):
                    foretold = foretell(words[name], count, probe, disturbed, trials[name])
                    rows.append(compare(name, foretold, RunFolder.open(place / str(number)), failed))
                print(f"\n{count} hosts of one rank, {mbit:g} Mbit/s; all cores at work: {disturbed:.2f}")
                print(probe.text())
                header = ("job", "predicted s", "measured s", "ratio", "train", "communicate", "server", "bytes")
                print("\n".join(aligned([header, *rows], (0,))), flush=True)
    print("\n" + ("\n".join(failed) if failed else "as required"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
