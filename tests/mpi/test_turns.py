"""Ranks of one core take turns: nothing changes but the order in time, and a rank that hangs is found all the same."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpifed.errors import UNEXPECTED
from tests.launch import run_module
from tests.mpi.equality import differences, outcome

pytestmark = [pytest.mark.mpi_skip, pytest.mark.timeout(300)]

DEFAULT_JOB = ("rounds=3", "evaluate.every_rounds=3", "checkpoint.every_rounds=3")


@pytest.fixture
def one_core() -> Iterator[None]:
    """For what this test starts."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def left_behind() -> list[Path]:
    return [file for folder in ("/dev/shm", tempfile.gettempdir()) for file in Path(folder).glob("mpifed-turns-*")]


@pytest.mark.usefixtures("one_core")
def test_the_same_with_and_without(tmp_path: Path) -> None:
    """Ten clients on four ranks that train, on one core."""
    before = left_behind()
    for turns in ("auto", "off"):
        finished = run_module(5, "mpifed.run", *DEFAULT_JOB, f"turns={turns}", f"out={tmp_path / turns}", timeout=120)
        assert ("4 ranks train in 1 turn on a node" in finished.stdout) == (turns == "auto"), finished
    assert differences(outcome(tmp_path / "auto"), outcome(tmp_path / "off")) == []
    assert left_behind() == before


@pytest.mark.usefixtures("one_core")
def test_the_one_that_hangs_in_its_turn_is_named_and_not_those_that_wait(tmp_path: Path) -> None:
    """Client 3 hangs; the three other ranks wait for their turn, or for the exchange, and are not to blame."""
    job = Path(__file__).parents[1] / "faults" / "job.toml"
    hanging = ("algorithm.name=tests.faults.broken:BadClients", "algorithm.hanging=[3]", "round_timeout=5")
    finished = run_module(5, "mpifed.run", job, f"out={tmp_path / 'run'}", *hanging, timeout=120, check=False)
    assert finished.returncode in (UNEXPECTED, 9), finished  # 9: what MPICH's mpirun makes of an abort
    assert finished.stderr.count("came to no exchange for 5 s (round_timeout)") == 1, finished
    assert "broken.py" in finished.stderr, finished
