"""The communicator's checks on threads, under mpirun, and on the world of a launch of pytest (see `conftest`)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mpifed.comm.communicator import Communicator
from mpifed.comm.inprocess import run_ranks as run_threads
from tests.launch import launch, run_ranks
from tests.mpi.checks import CHECKS
from tests.mpi.conftest import LIMIT

HERE = Path(__file__).parent
SIZES = (1, 2, 3, 4, 11)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CHECKS)
def test_on_threads(name: str, size: int) -> None:
    run_threads(size, CHECKS[name])


@pytest.mark.mpi_skip
@pytest.mark.parametrize("size", SIZES)
def test_under_mpirun(size: int) -> None:
    """All checks in one launch: every rank has passed every one."""
    ranks = run_ranks("tests.mpi.checks:run_all", size, timeout=LIMIT, arguments={"checks": "tests.mpi.checks"})
    assert ranks == [dict.fromkeys(CHECKS, True)] * size


@pytest.mark.mpi(min_size=2)
@pytest.mark.timeout(LIMIT, method="thread")
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_world(name: str, world: Communicator) -> None:
    CHECKS[name](world)
