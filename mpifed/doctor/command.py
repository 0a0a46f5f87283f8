"""`python -m mpifed doctor [--out DIR]`, alone or under mpirun or srun: what is wrong here, and what to do.

Exit code 0 without an error, 2 with one. Every process that a launcher starts only starts others and listens to them:
the first one of each node those that look at the node, and each of them one that is a rank.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpifed.comm.launched import local_rank, rank, sizes
from mpifed.doctor.finding import Finding, to_json
from mpifed.doctor.isolation import Isolated
from mpifed.doctor.mpi import LAUNCHER, launcher
from mpifed.errors import BAD_INPUT, COMPLETE
from mpifed.output import say

FILES = "mpifed.doctor.files"
OF_A_NODE = (
    Isolated("mpi", "mpifed.doctor.mpi:library", 60, "is the MPI installation on a file system that hangs?"),
    Isolated("torch", "mpifed.doctor.machine:torch", 180, "is the environment on a file system that hangs?"),
    Isolated("gpu", "mpifed.doctor.machine:gpu", 180, "the GPU driver hangs; set device=cpu, or ask for another node"),
    Isolated("folder", f"{FILES}:folder", 30, "the file system hangs; choose another with out=..."),
    Isolated("locks", f"{FILES}:locks", 30, "the file system's lock service hangs; choose another with out=..."),
    Isolated("hdf5", f"{FILES}:hdf5", 60, "the file system's lock service hangs; export HDF5_USE_FILE_LOCKING=FALSE"),
    Isolated("/dev/shm", f"{FILES}:shared_memory", 30),
    Isolated("memory", f"{FILES}:data", 60),
    Isolated("slurm", "mpifed.doctor.slurm:slurm", 60, "Slurm's controller hangs; ask its administrators"),
)
TWO_RANKS = Isolated("two ranks", "mpifed.doctor.mpi:hello", 60, LAUNCHER)
EVERYONE = Isolated("ranks", "mpifed.doctor.world:everyone", 120 + max(check.seconds for check in OF_A_NODE), LAUNCHER)
"""Other nodes may still be looking at themselves."""


def main(argv: Sequence[str]) -> int:
    """Print what was found, and the exit code: by rank 0 alone, as a launcher ends the others when one has failed."""
    parser = argparse.ArgumentParser(
        prog="mpifed doctor", description="Look at this machine, or at that of every rank."
    )
    parser.add_argument("--out", default="runs", metavar="DIR", help="the folder that runs will be written to (runs)")
    out = Path(parser.parse_args(argv).out)
    found = examine(out)
    if found:
        launched = bool(sizes(os.environ))  # a launcher's output may look like a terminal and end in a file
        colour = sys.stdout.isatty() and not launched and "NO_COLOR" not in os.environ
        lines = [finding.line(colour) for finding in found]
        errors, warnings = (sum(finding.level == level for finding in found) for level in ("error", "warning"))
        lines.append(f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}")
        say("\n".join(lines) + "\n", sys.stdout)
    return BAD_INPUT if any(finding.level == "error" for finding in found) else COMPLETE


def examine(out: Path, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """All findings at rank 0, none at any other."""
    mine: list[Finding] = []
    if local_rank(environment) == 0:
        started = [(check, check.start(out)) for check in OF_A_NODE]
        mine = [finding for _, running in started for finding in running.findings()]
        mine += _two_ranks(out, environment)
    found = EVERYONE.start(out, given=to_json(mine), inherit=True).findings()
    if rank(environment) != 0:
        return []
    if [finding.name for finding in found] == [EVERYONE.name]:  # it crashed or hangs: this node's findings are here
        return [*mine, *found]
    return found


def _two_ranks(out: Path, environment: Mapping[str, str]) -> list[Finding]:
    """Where nobody has started several: two that are started as a user would."""
    path = launcher()
    if sizes(environment) or path is None:
        return []
    return TWO_RANKS.start(out, before=[path, "-n", "2"]).findings()
