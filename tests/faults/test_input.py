"""Bad input under mpirun: one message on one line, exit code 2, within seconds, and no run folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from benchmarks.kills import JOB
from mpifed.errors import BAD_INPUT
from tests.launch import ROOT, Finished, run_module

LIMIT_S = 60.0

# (what must be named, overrides): one of each kind; the table of all is in tests/unit/test_job.py
MALFORMED = [
    ("algorithm.muu", ["algorithm.muu=1"]),
    ("participation", ["participation=6"]),
    ("data.partition.name", ["data.partition.name=dirichelt"]),
    ("no/such/folder", ["data.name=mnist", "data.root=no/such/folder"]),
    ("bad.h5, train/y", ["data.name=hdf5", "data.root=.", "data.path=bad.h5"]),
    ("out", ["out=a_file/run"]),
]


@pytest.mark.parametrize(("named", "overrides"), MALFORMED, ids=[" ".join(overrides) for _, overrides in MALFORMED])
def test_a_job_that_cannot_run_is_refused_once(tmp_path: Path, named: str, overrides: list[str]) -> None:
    (tmp_path / "a_file").touch()
    with h5py.File(tmp_path / "bad.h5", "w") as file:  # as many labels as samples, but for one
        for name in ("train", "test"):
            file[f"{name}/x"] = np.zeros((20, 8, 8), np.uint8)
            file[f"{name}/y"] = np.zeros(19, np.int64)
        file.attrs.update(classes=2, mean=0.5, std=0.5)
    before = sorted(tmp_path.rglob("*"))
    finished = run_module(3, "mpifed.run", JOB, "out=run", *overrides, cwd=tmp_path, timeout=LIMIT_S, check=False)
    _check_refused(finished, named)
    assert sorted(tmp_path.rglob("*")) == before


def test_ranks_that_do_not_see_each_other_are_refused(tmp_path: Path) -> None:
    """What a launcher of another MPI library does: three processes, each of them rank 0 of 1."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_"))}
    environment |= {"SLURM_STEP_NUM_TASKS": "3", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, "-m", "mpifed.run", str(JOB), "out=run"],
        env=environment,
        cwd=tmp_path,
        timeout=LIMIT_S,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == BAD_INPUT, finished
    assert "the launcher started 3 processes (SLURM_STEP_NUM_TASKS)" in finished.stderr
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    finished = run_module(3, "mpifed.run", "--resume", tmp_path, timeout=LIMIT_S, check=False)
    _check_refused(finished, str(tmp_path))
    assert not any(tmp_path.iterdir())


def _check_refused(finished: Finished, named: str) -> None:
    assert finished.returncode == BAD_INPUT, finished
    said = [line for line in finished.stderr.splitlines() if line.startswith("mpifed: ")]
    assert len(said) == 1 and named in said[0], finished
    assert "Traceback" not in finished.stderr, finished
