"""Slurm: what its configuration and this job's say about starting ranks, ending them, and starting again."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from mpifed.doctor.finding import Finding, error, ok, warning
from mpifed.doctor.mpi import family

TYPES = {"MPICH": "pmi2", "Intel MPI": "pmi2", "Open MPI": "pmix"}
"""The `srun --mpi` that a family of libraries understands."""


def slurm(out: Path) -> Iterator[Finding]:
    """Of the controller that answers, and of the job in which this runs."""
    if shutil.which("scontrol") is None:
        if "SLURM_JOB_ID" in os.environ:
            yield error("slurm", "this is a Slurm job, but there is no scontrol on PATH", "add Slurm's bin to PATH")
        else:
            yield ok("slurm", "none here")
        return
    asked = _ask("scontrol", "show", "config")
    if asked.returncode != 0:
        said = asked.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        level = error if "SLURM_JOB_ID" in os.environ else warning
        yield level("slurm", f"the controller does not answer ({said[0]})", "without Slurm use mpirun")
        return
    config = _fields(asked.stdout)
    yield from of_the_site(config, _ask("srun", "--mpi=list"), library())
    if "SLURM_JOB_ID" in os.environ:
        yield from of_the_job(_ask("scontrol", "show", "job", os.environ["SLURM_JOB_ID"]).stdout, os.environ)


def library() -> str:
    """The family of the library that mpi4py loads, or nothing."""
    from mpifed.comm.mpi import installed

    try:
        return family(installed()["library"])
    except (ImportError, RuntimeError):
        return ""


def of_the_site(config: Mapping[str, str], listed: subprocess.CompletedProcess[str], ours: str) -> Iterator[Finding]:
    """The types of `srun --mpi`, and how a step ends of which a rank has died."""
    default, types = config.get("MpiDefault", "none"), (listed.stdout + listed.stderr).replace(",", " ").split()
    wanted = TYPES.get(ours, "")
    named = next((name for name in types if name == wanted or name.startswith(f"{wanted}_v")), "") if wanted else ""
    version = config.get("SLURM_VERSION", "")
    if wanted and not named:
        yield warning("slurm", f"{version}: srun has no --mpi={wanted}, which {ours} needs",
                      "start ranks with mpirun inside the job; slurm/run.sh does")  # fmt: skip
    elif wanted and not default.startswith(wanted):
        yield warning("slurm", f"{version}: plain srun means --mpi={default}, and ranks of {ours} would each be alone",
                      f"srun --mpi={wanted}, or export SLURM_MPI_TYPE={wanted}; slurm/run.sh does")  # fmt: skip
    else:
        yield ok("slurm", f"{version}: plain srun means --mpi={default}, which {ours or 'the library'} understands")
    if config.get("KillOnBadExit", "0") == "0" and wanted == "pmi2":
        yield warning("slurm", f"KillOnBadExit=0: with {ours}, a rank that is killed leaves the others running",
                      "srun --wait=60; slurm/run.sh does")  # fmt: skip


def of_the_job(job: str, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Requeue and time limit."""
    fields = dict(word.partition("=")[::2] for word in job.split())
    if not fields:
        yield warning("slurm job", f"job {environment['SLURM_JOB_ID']} is not known to the controller")
        return
    until = f"until {fields.get('EndTime', 'its end')}" if fields.get("TimeLimit") != "UNLIMITED" else "without limit"
    if fields.get("Requeue") == "0":
        yield warning("slurm job", f"{fields['JobId']} may not be requeued, {until}",
                      "sbatch --requeue, to go on after preemption or a time limit")  # fmt: skip
    elif fields.get("TimeLimit") != "UNLIMITED" and "SLURM_JOB_END_TIME" not in environment:
        yield warning("slurm job", f"{fields['JobId']} runs {until}, which a run cannot see without SLURM_JOB_END_TIME",
                      "start it by slurm/run.sh, or set time_limit")  # fmt: skip
    else:
        yield ok("slurm job", f"{fields['JobId']} runs {until}, and may be requeued")


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


def _fields(text: str) -> dict[str, str]:
    """`Key   = value` line by line."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}
