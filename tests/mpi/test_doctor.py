"""`mpifed doctor` on ranks that see each other, and on one that does not see those that were started with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpifed.errors import BAD_INPUT
from tests.launch import ROOT, run_module

pytestmark = [pytest.mark.mpi_skip, pytest.mark.timeout(300)]
LINE = re.compile(r"(ok|warning|error) +(\S+|two ranks|slurm job) +\S")


def test_three_ranks(tmp_path: Path) -> None:
    """Each thing once, in plain text, by rank 0; the folder is as it was."""
    finished = run_module(3, "mpifed", "doctor", "--out", str(tmp_path), timeout=200)
    *lines, last = finished.stdout.splitlines()
    assert all(LINE.match(line) for line in lines), finished
    names = [LINE.match(line)[2] for line in lines]  # type: ignore[index]
    expected = ["mpi", "launcher", "torch", "gpu", "folder", "locks", "hdf5", "/dev/shm", "memory", "slurm"]
    assert set(names) >= {*expected, "ranks", "cores", "waiting", "clocks", "wire", "deaths"}, finished
    assert "3 that see each other" in finished.stdout
    assert last.startswith("0 errors, ")
    assert list(tmp_path.iterdir()) == []


def test_one_of_four_that_sees_nobody_else(tmp_path: Path) -> None:
    """As under the launcher of another MPI library: the error, after what was found on this node, and exit code 2."""
    environment = os.environ | {"PMI_SIZE": "4", "PMI_RANK": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mpifed", "doctor", "--out", str(tmp_path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == BAD_INPUT, finished
    [line] = [line for line in finished.stdout.splitlines() if line.startswith("error")]
    assert "the launcher started 4 processes (PMI_SIZE) but each sees a world of one rank" in line
    assert "ok       torch" in finished.stdout
