"""What FedFTG's server step costs, and where: processor seconds by number of teachers, and the largest costs.

usage: python benchmarks/fedftg_step.py [--job jobs/fedftg/mnist_small.toml] [--teachers 5 10 20] [key=value ...]

Fine-tunes a model at its start with teachers that are that model plus noise: for what it costs, values do not matter.
One thread. Needs the job's data set, for its shape (MPIFED_DATA).
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from pathlib import Path
from typing import Any

import torch

from mpifed.comm.inprocess import InProcess
from mpifed.federation.federation import Federation
from mpifed.job import load

COSTS = {
    "backward passes": ("run_backward",),
    "convolutions": ("conv2d",),
    "upsampling in the generator": ("upsample_nearest2d",),
    "batch normalisation": ("torch.batch_norm",),
    "diversity loss": ("_pairs", "'abs'", "cdist"),
    "Adam": ("_single_tensor_adam",),
    "SGD": ("_single_tensor_sgd",),
}
"""What is shown by name, and the functions that are counted for it."""


def fine_tuning(text: str, overrides: list[str], teachers: int) -> Any:
    """A function without arguments that makes one server step after the base's."""
    federation = Federation.build(load(text, overrides), InProcess.alone())
    algorithm, env = federation.algorithm, federation.env
    random = torch.Generator().manual_seed(0)
    parameters, buffers = env.initial()
    clients = (
        parameters + 0.01 * torch.randn(teachers, len(parameters), generator=random),
        buffers.expand(teachers, -1).clone(),
    )
    counts = torch.randint(1, 100, (teachers, env.spec.classes), generator=random)
    server = algorithm.server_init(env)
    return lambda: algorithm.fine_tune(env, server, server["base"], clients, counts, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="jobs/fedftg/mnist_small.toml", type=Path)
    parser.add_argument("--teachers", nargs="+", type=int, default=[5, 10, 20])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    text = arguments.job.read_text()
    for variant in ("paper", "official"):
        for teachers in arguments.teachers:
            step = fine_tuning(text, [f"algorithm.variant={variant}", *arguments.overrides], teachers)
            step()
            began = time.process_time()
            step()
            print(
                f"{variant:9s} {teachers:3d} teachers  {time.process_time() - began:7.2f} s of a processor", flush=True
            )
        profile = cProfile.Profile()
        profile.runcall(step)
        stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
        total = sum(own for _, _, own, _, _ in stats.values())
        shares = {
            cost: sum(own for (_, _, name), (_, _, own, _, _) in stats.items() if any(f in name for f in functions))
            for cost, functions in COSTS.items()
        }
        for cost, seconds in sorted(shares.items(), key=lambda item: -item[1])[:5]:
            print(f"    {seconds / total:5.0%}  {cost}")


if __name__ == "__main__":
    main()
