"""`python -m mpifed probe [JOB.toml] [key=value ...] [--out FILE]`: what collectives and a job's work take here.

Under mpirun or srun every collective that the engine uses is measured on these ranks, in a few sizes, each as long as
its slowest rank; and the job's work (`mpifed.predict.trial`) on one rank alone, and then on as many ranks of a node as
have a core, which says how much they disturb each other. `mpifed predict --probe FILE` reads it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpifed.comm.communicator import Communicator
from mpifed.errors import COMPLETE, BadInput
from mpifed.federation.turns import usable_cores
from mpifed.output import say
from mpifed.predict.bytes import Operation
from mpifed.predict.compute import Work
from mpifed.predict.cost import Curve
from mpifed.predict.measured import Probe

SIZES = (64, 1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22, 1 << 23)
"""Bytes: of the whole payload of gather and scatter, of each rank's otherwise."""
REPETITIONS = 5
SLOW = 0.7
"""Seconds of one collective after which larger sizes are left out, and repetitions are two."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the file at rank 0; the exit code."""
    from mpifed.comm.mpi import world
    from mpifed.errors import MpifedError
    from mpifed.guard import guarded
    from mpifed.memory import keep_freed_memory

    keep_freed_memory()
    try:
        comm = world()
    except MpifedError as error:
        print(f"mpifed: {error}", file=sys.stderr)
        return error.exit_code
    return guarded(comm, lambda: _main(list(sys.argv[1:] if argv is None else argv), comm))


def _main(argv: list[str], comm: Communicator) -> int:
    from mpifed.federation.agreement import on_every_rank
    from mpifed.job import Job
    from mpifed.run import read_job

    arguments = _arguments(argv)
    job: Job = on_every_rank(comm, lambda: read_job(arguments.job))
    found = probe(comm, job, arguments.seconds)
    problem = None
    if found is not None:
        try:
            Path(arguments.out).write_text(found.to_json(), encoding="utf-8")
            say(found.text() + f"\nwritten to {arguments.out}\n", sys.stdout)
        except OSError as error:
            problem = f"--out: {arguments.out} cannot be written ({error.strerror}); choose another file"
    problem = comm.agree(problem)
    if problem is not None:
        raise BadInput(problem)
    return COMPLETE


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mpifed probe", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("job", nargs="*", metavar="JOB.toml | key=value", help="a job file, then overrides")
    parser.add_argument("--out", default="probe.json", metavar="FILE", help="file to write (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of each trial of the job's work")
    return parser.parse_intermixed_args(list(argv))


def probe(comm: Communicator, job: Any, seconds: float) -> Probe | None:
    """Measure on all ranks together; the result at rank 0."""
    from mpifed.predict.trial import try_out

    hosts = comm.find_nodes()
    count = int(comm.broadcast_json(cores()))
    curves = {name: Curve(*points) for name, points in collectives(comm).items()} if comm.size > 1 else {}
    compute = try_out(job, seconds) if comm.rank == 0 else None
    comm.barrier()
    contention = 1.0
    together = min(count, Counter(hosts)[hosts[0]])
    if together > 1:  # the same at once on as many ranks of rank 0's node as it has cores
        first = [rank for rank, host in enumerate(hosts) if host == hosts[0]][:together]
        crowded = try_out(job, seconds) if comm.rank in first else None
        comm.barrier()
        if compute is not None and crowded is not None:
            contention = _ratio(crowded.client, compute.client)
    if compute is None:
        return None
    return Probe(job.canonical(), hosts, count, max(1.0, contention), curves, compute, reference())


def _ratio(crowded: Mapping[str, Any], alone: Mapping[str, Any]) -> float:
    """How many times as long training takes, in the phase that takes longest."""
    work = Work(30.0, 1000.0)
    longest = max(alone, key=lambda name: alone[name][0].at(work))
    return float(crowded[longest][0].at(work) / max(1e-9, alone[longest][0].at(work)))


def cores() -> int:
    """Those that this process may run on."""
    return len(usable_cores())


def reference(repetitions: int = 5) -> float:
    """Seconds of a fixed piece of work on one core here, by which other machines' compute times are scaled."""
    import torch

    torch.set_num_threads(1)
    a = torch.ones(384, 384)
    taken = []
    for _ in range(repetitions):
        started = time.perf_counter()
        for _ in range(10):
            a = (a @ a).clamp_(0, 1)
        taken.append(time.perf_counter() - started)
    return min(taken)


# --- collectives ------------------------------------------------------------------------------------------------------
def collectives(comm: Communicator) -> dict[Operation, tuple[list[float], list[float]]]:
    """Bytes and seconds of each operation, the median of its repetitions as the slowest rank takes them."""
    return {name: _measure(comm, name, act) for name, act in _OPERATIONS.items()}


def _measure(
    comm: Communicator, name: Operation, act: Callable[[Communicator, int], None]
) -> tuple[list[float], list[float]]:
    sizes: list[float] = []
    seconds: list[float] = []
    for size in SIZES:
        act(comm, size)
        repetitions = REPETITIONS if not seconds or seconds[-1] < SLOW / 10 else 2
        taken = []
        for _ in range(repetitions):
            comm.barrier()
            started = time.perf_counter()
            act(comm, size)
            taken.append(time.perf_counter() - started)
        parts = comm.gather_json(taken)
        slowest = None if parts is None else np.max(parts, axis=0).tolist()
        slowest = comm.broadcast_json(slowest)
        sizes.append(float(size))
        seconds.append(statistics.median(slowest))
        if seconds[-1] > SLOW:
            break
    return sizes, seconds


def _broadcast(comm: Communicator, size: int) -> None:
    comm.broadcast(np.zeros(size, np.uint8), {})


def _of_others(comm: Communicator, size: int) -> list[int]:
    """Rank 0 has no part, as it trains no client."""
    return [0] + [size // (comm.size - 1)] * (comm.size - 1)


def _gather(comm: Communicator, size: int) -> None:
    counts = _of_others(comm, size)
    comm.gather(np.zeros(counts[comm.rank], np.uint8), counts, {})


def _scatter(comm: Communicator, size: int) -> None:
    counts = _of_others(comm, size)
    comm.scatter(np.zeros(sum(counts), np.uint8) if comm.rank == 0 else None, counts, {})


def _reduce(comm: Communicator, size: int) -> None:
    comm.reduce(np.zeros(size // 8, np.float64), {})


def _sum(comm: Communicator, size: int) -> None:
    comm.sum_everywhere(np.zeros(size // 8, np.float64))


_OPERATIONS: dict[Operation, Callable[[Communicator, int], None]] = {
    "broadcast": _broadcast,
    "scatter": _scatter,
    "gather": _gather,
    "reduce": _reduce,
    "sum": _sum,
}
