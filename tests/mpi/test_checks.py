"""The checks of communicator and exchange: on threads, under mpirun, and on the world of a launched pytest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpifed.comm.communicator import Communicator
from mpifed.comm.inprocess import run_ranks as run_threads
from tests.launch import ROOT, launch, run_ranks
from tests.mpi.checks import every_check
from tests.mpi.conftest import LIMIT

COMMUNICATOR = "tests.mpi.checks"
EXCHANGE = "tests.mpi.exchange_checks"
CHECKS = every_check([COMMUNICATOR, EXCHANGE])

ONE_RANK_FAILS = """
import pytest

@pytest.mark.mpi(min_size=2)
def test_rank_one_fails_before_the_collective(world):
    assert world.rank != 1, "rank one has had enough"
    world.barrier()

@pytest.mark.mpi(min_size=2)
def test_that_follows(world):
    world.barrier()
"""


# --- each check, three times ------------------------------------------------------------------------------------------
@pytest.mark.mpi_skip
@pytest.mark.parametrize("size", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("name", CHECKS)
def test_on_threads(name: str, size: int) -> None:
    run_threads(size, CHECKS[name])


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("size", "modules"),
    [(1, [COMMUNICATOR]), (2, [COMMUNICATOR]), (3, [COMMUNICATOR, EXCHANGE]), (11, [COMMUNICATOR])],
)
def test_under_mpirun(size: int, modules: list[str]) -> None:
    """All in one launch: every rank has passed every check. Four ranks: `test_pytest_on_four_ranks`."""
    ranks = run_ranks("tests.mpi.checks:run_all", size, timeout=LIMIT, arguments={"modules": modules})
    assert ranks == [list(every_check(modules))] * size


@pytest.mark.mpi(min_size=2)
@pytest.mark.timeout(LIMIT, method="thread")
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_world(name: str, world: Communicator) -> None:
    CHECKS[name](world)


# --- pytest itself under mpirun ---------------------------------------------------------------------------------------
@pytest.mark.mpi_skip
def test_pytest_on_four_ranks() -> None:
    """Every rank's closing line says that every check has passed, and that nothing was skipped."""
    args = ["-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "--with-mpi", "tests/mpi"]
    finished = launch(4, args, timeout=2 * LIMIT, cwd=ROOT)
    assert re.findall(r"(\d+) passed, \d+ deselected in", finished.stdout) == [str(len(CHECKS))] * 4, finished


@pytest.mark.mpi_skip
def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    """At once, and with its reason, though they wait for it in a collective."""
    file = tmp_path / "test_one_rank_fails.py"
    file.write_text(ONE_RANK_FAILS)
    args = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.mpi.conftest", "--with-mpi", str(file)]
    finished = launch(3, args, timeout=60, cwd=tmp_path, check=False)
    assert finished.returncode != 0
    assert "rank 1: test_one_rank_fails.py::test_rank_one_fails_before_the_collective failed" in finished.stderr
    assert "rank one has had enough" in finished.stderr
