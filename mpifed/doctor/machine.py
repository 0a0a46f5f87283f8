"""Python, torch, threads and GPUs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import mpifed
from mpifed.comm.launched import sizes
from mpifed.doctor.finding import Finding, error, ok, warning
from mpifed.doctor.isolation import Isolated
from mpifed.doctor.mpi import launcher

EXCHANGE = Isolated("gpu", "mpifed.doctor.machine:gpu_exchange", 60)


def torch(out: Path) -> Iterator[Finding]:
    """Versions; a product of matrices; how many threads torch would take."""
    try:
        import torch as library

        library.ones(64, 64) @ library.ones(64, 64)
    except (ImportError, OSError, RuntimeError) as failed:
        yield error("torch", f"cannot be used ({' '.join(str(failed).split())[:200]})", "install it again")
        return
    cores = len(os.sched_getaffinity(0))
    yield ok(
        "torch",
        f"mpifed {mpifed.__version__}, Python {platform.python_version()}, torch {library.__version__}; "
        f"{library.get_num_threads()} threads on {cores} of {os.cpu_count()} cores, of which a job takes `threads`",
    )


def gpu(out: Path) -> Iterator[Finding]:
    """GPUs that torch can use, each tried; and whether MPI takes buffers that are in their memory."""
    import torch as library

    if not library.cuda.is_available():
        devices = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*")) + sorted(
            str(path) for path in Path("/dev").glob("kfd")
        )
        if devices:
            yield warning("gpu", f"{', '.join(devices)} here, but torch {library.__version__} cannot use it",
                          "install a torch build for this driver, or set device=cpu")  # fmt: skip
        else:
            yield ok("gpu", "none: training on the CPU; GPU-aware MPI has nothing to move")
        return
    names = []
    for index in range(library.cuda.device_count()):
        try:
            library.ones(8, device=f"cuda:{index}").sum().item()
        except RuntimeError as failed:
            yield error("gpu", f"cuda:{index} cannot compute ({str(failed).splitlines()[0]})", "set device=cpu, or ask "
                        "for another GPU")  # fmt: skip
            return
        names.append(library.cuda.get_device_name(index))
    yield ok("gpu", f"{len(names)} x {names[0]}, one rank each; share_gpus=true lets ranks share one")
    mpirun = launcher()
    if mpirun is None or sizes(os.environ):
        return  # a launcher within a launcher would be another thing to go wrong
    found = EXCHANGE.start(out, before=[mpirun, "-n", "2"]).findings()
    aware = all(finding.level == "ok" for finding in found)
    said = "moves buffers in GPU memory" if aware else f"does not move buffers in GPU memory ({found[0].what})"
    yield ok("gpu", f"the MPI library {said}; mpifed does not ask for it, it sends from host memory")


def gpu_exchange(out: Path) -> Iterator[Finding]:
    """On two ranks: a vector goes from GPU memory to GPU memory; a library that cannot may crash."""
    import torch as library

    from mpifed.comm.mpi import broadcast_in_place

    rank = broadcast_in_place(None)
    vector = library.full((1000,), 7.0 if rank == 0 else 0.0, device="cuda")
    broadcast_in_place(vector)
    library.cuda.synchronize()
    if bool((vector == 7).all()):
        yield ok("gpu", "it arrived")
    else:
        yield error("gpu", "what arrived is something else")
