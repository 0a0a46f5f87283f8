"""What the launcher says about this process in its environment, whatever the MPI library makes of it."""

from __future__ import annotations

from collections.abc import Mapping

SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Not `SLURM_NTASKS`, which a batch script has too."""
RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
LOCAL_RANKS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_LOCAL_RANK", "SLURM_LOCALID")


def sizes(environment: Mapping[str, str]) -> dict[str, int]:
    """How many processes were started together, by the variable that says so; empty where no launcher started this."""
    return {name: int(environment[name]) for name in SIZES if environment.get(name, "").isdigit()}


def rank(environment: Mapping[str, str]) -> int:
    """The number of this process among them; 0 where nobody says."""
    return _first(RANKS, environment)


def local_rank(environment: Mapping[str, str]) -> int:
    """The same among those of this node."""
    return _first(LOCAL_RANKS, environment)


def _first(names: tuple[str, ...], environment: Mapping[str, str]) -> int:
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), 0)
