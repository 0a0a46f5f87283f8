"""The five systems at 10 to 100,000 clients, as `mpifed predict` has them: the tables of docs/scale.md.

usage:  python -m benchmarks.scale [--clients 10 100 ...] [--systems FedAvg ...] [--seconds S]

Each row is what `mpifed predict` says of the job that `job` below puts together (`--show` prints the commands). A
system is tried out once, with 100 clients, on this machine: seconds are those of nodes with cores as fast as these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mpifed.federation.federation import Federation
from mpifed.job import Job, load
from mpifed.memory import keep_freed_memory
from mpifed.predict.command import hosts
from mpifed.predict.compute import Compute
from mpifed.predict.cost import Link, Textbook
from mpifed.predict.prediction import Prediction, predict
from mpifed.predict.timeline import Cores
from mpifed.predict.trial import resident, try_out
from mpifed.predict.units import size
from mpifed.report.layout import aligned

RANKS, NODES, CORES = 65, 4, 16
NETWORK = Textbook(Link(20e-6, 8 / 10e9))
"""10 Gbit/s, 20 us."""
COMMON = [
    *("data.name=synthetic", "data.input_shape=[1, 28, 28]", "data.test_samples=1000", "data.partition.name=iid"),
    *("local.epochs=1", "local.batch_size=20", "rounds=3", "checkpoint.every_rounds=0", "device=cpu"),
]
SAMPLES = 60
"""Of each client."""
MENTORS = 'client_models=[{name = "cnn"}]'
SYSTEMS = {
    "FedAvg": ["algorithm.name=fedavg", "model.name=cnn"],
    "FedMD": [
        *("algorithm.name=fedmd", "model.name=cnn", "algorithm.subset_size=1000"),
        'data.public={name = "synthetic", samples = 5000, input_shape = [1, 28, 28]}',
    ],
    "FedGen": ["algorithm.name=fedgen", "model.name=cnn", "algorithm.generator_steps=20"],
    "FedFTG": [
        *("algorithm.name=fedftg", "model.name=cnn", "algorithm.channels=16", "algorithm.iterations=5"),
        "algorithm.batch_size=32",
    ],
    "FedKD": [*("algorithm.name=fedkd", "model.name=mlp", "model.hidden=[200]"), MENTORS],
}
MODES = {
    "all, ordered": [],
    "all, tree": ["reduce=tree"],
    "all, hierarchical": ["collectives=hierarchical"],
    "1,000 a round": ["participation=1000"],
    "100 a round": ["participation=100"],
}


def job(system: str, clients: int, *more: str) -> Job:
    """The job of a row."""
    words = [*COMMON, f"clients={clients}", f"data.samples={SAMPLES * clients}", *SYSTEMS[system], *more]
    return load(None, words, f"{system} with {clients} clients")


def foretell(of: Job, compute: Compute, process: int) -> Prediction:
    places = hosts(RANKS, NODES)
    return predict(Federation.planned(of, places), compute, NETWORK, Cores(places, CORES), process)


def row(name: str, clients: int, found: Prediction) -> tuple[str, ...]:
    """Bytes and seconds of a later round, memory at rank 0 and on the rank with the most."""
    most = found.a_round[1] or found.a_round[0]
    return (
        name,
        f"{clients:,}",
        size(most.logical),
        size(most.sent),
        size(sum(found.memory.root.values())),
        size(sum(found.memory.rank.values())),
        f"{found.later_rounds:,.3g}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1_000, 10_000, 100_000])
    parser.add_argument("--systems", nargs="+", choices=tuple(SYSTEMS), default=tuple(SYSTEMS))
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of each trial")
    parser.add_argument("--show", action="store_true", help="print the commands and leave")
    arguments = parser.parse_args(argv)
    if arguments.show:
        tail = f"--ranks {RANKS} --nodes {NODES} --cores {CORES} --bandwidth 10Gbit --latency 20us"
        for system in arguments.systems:
            quoted = " ".join(f"'{word}'" if " " in word else word for word in [*COMMON, *SYSTEMS[system]])
            print(f"mpifed predict {quoted} clients=N data.samples={SAMPLES}*N {tail}")
        return 0
    keep_freed_memory()
    process = resident()
    rows, modes = [], []
    for system in arguments.systems:
        compute = try_out(job(system, 100), arguments.seconds)
        for clients in arguments.clients:
            rows.append(row(system, clients, foretell(job(system, clients), compute, process)))
        most = max(arguments.clients)
        for mode, more in MODES.items() if system == "FedAvg" else [("100 a round", MODES["100 a round"])]:
            modes.append(row(f"{system}, {mode}", most, foretell(job(system, most, *more), compute, process)))
        print(f"{system} done", file=sys.stderr, flush=True)
    header = ("", "clients", "logical a round", "MPI sent a round", "rank 0 holds", "a rank holds", "s a round")
    print("\n".join(aligned([header, *rows], (0,))) + "\n\n" + "\n".join(aligned([header, *modes], (0,))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
