"""How FedGen's server step grows with the number of clients: all heads answer a batch in one product of matrices.

    python benchmarks/fedgen_server.py [--clients 5 20 100] [--repetitions 15]

The step of the paper's MNIST setting (`fedgen_net`, 50 generator updates on batches of 32): from the round's heads and
label counts to the next state. Numbers of clients take turns; printed are medians of processor time and their ratio to
the first. Required: 20 clients take at most 1.5 times as long as 5.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpifed.algorithms.fedgen import FedGen
from mpifed.comm.inprocess import InProcess
from mpifed.federation.federation import Federation
from mpifed.job import load

JOB = """
rounds = 200
clients = 10
algorithm = { name = "fedgen" }
model = { name = "fedgen_net" }
data = { name = "synthetic", input_shape = [1, 28, 28], classes = 10, samples = 500, test_samples = 100 }
"""


@dataclass
class Replies:
    """Uploads of so many clients; the means are as they would be: one tensor, whatever their number."""

    fields: dict[str, Tensor]

    def mean(self, name: str) -> Tensor:
        return self.fields[name].mean(dim=0)

    def each(self, name: str) -> Sequence[Tensor]:
        return list(self.fields[name])


def replies(federation: Federation, clients: int) -> Replies:
    """Random updates and counts."""
    (phase,) = federation.algorithm.phases(federation.env)
    random = torch.Generator().manual_seed(clients)
    fields = {}
    for name, field in phase.up(2).items():
        shape: tuple[int, ...] = (clients, *field.shape)  # type: ignore[assignment]
        drawn = torch.randn(shape, generator=random) * 0.01
        fields[name] = torch.randint(0, 99, shape, generator=random).int() if name == "label_counts" else drawn
        if field.reduce.__class__.__name__ == "Mean":
            fields[name] = drawn[:1]  # the engine adds it up before the server's step
    return Replies(fields)


def measure(clients: Sequence[int], repetitions: int, **switches: Any) -> dict[int, list[float]]:
    """Milliseconds of processor time of the server's step, by number of clients."""
    federation = Federation.build(load(JOB, [], "the benchmark"), InProcess.alone())
    algorithm = FedGen(**switches)
    server = algorithm.server_init(federation.env)
    uploads: dict[int, Any] = {k: replies(federation, k) for k in clients}
    times: dict[int, list[float]] = {k: [] for k in clients}
    for repetition in range(repetitions + 1):
        for k in clients:
            started = time.process_time()
            algorithm.server_step(federation.env, server, uploads[k], 2)
            if repetition:  # the first is a warm-up
                times[k].append(1000 * (time.process_time() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[5, 20, 100])
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for variant in ("official", "paper"):
        times = measure(arguments.clients, arguments.repetitions, variant=variant)
        base = statistics.median(times[arguments.clients[0]])
        for k in arguments.clients:
            median, least = statistics.median(times[k]), min(times[k])
            print(f"{variant:8s} {k:4d} clients: {median:7.1f} ms (least {least:.1f}), ratio {median / base:.2f}")


if __name__ == "__main__":
    main()
