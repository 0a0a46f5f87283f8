"""The same program in every kind of world: with and without mpirun, without an MPI library, with too many ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpifed.errors import BAD_INPUT, COMPLETE, REQUEUE
from tests.algorithm_table import ROWS, job_of
from tests.launch import ROOT, Finished, Launch, mpirun, run_module
from tests.mpi.equality import differences, outcome

pytestmark = pytest.mark.mpi_skip

LIMIT = 120
ANNOUNCED = re.compile(r"(PMI|PMIX|OMPI|SLURM)_")
"""Variables by which a launcher tells its processes how many they are."""


def without_launcher(*args: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> Finished:
    """`python -m mpifed.run ARGS...` as a plain process."""
    clean = {name: value for name, value in os.environ.items() if not ANNOUNCED.match(name)}
    command = [sys.executable, "-m", "mpifed.run", *args]
    started = time.monotonic()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=cwd,
        env=clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {}),
    )
    return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job file; it says nothing about ranks."""
    file = tmp_path_factory.mktemp("job") / "job.toml"
    file.write_text(job_of(ROWS[0], clients=2, participation=1.0).to_toml())
    return str(file)


@pytest.fixture(scope="module")
def alone(job: str) -> Path:
    """The run folder of the job on one rank without mpirun, which says nothing out of the ordinary."""
    folder = Path(job).with_name("alone")
    finished = without_launcher(job, f"out={folder}")
    assert finished.returncode == COMPLETE and said(finished) == [], finished
    return folder


def said(finished: Finished) -> list[str]:
    """The lines of warning of a run, whoever printed them."""
    return [line for line in (finished.stdout + finished.stderr).splitlines() if line.startswith("mpifed:")]


def test_one_rank_under_mpirun(job: str, alone: Path, tmp_path: Path) -> None:
    finished = run_module(1, "mpifed.run", job, f"out={tmp_path / 'run'}", timeout=LIMIT)
    assert said(finished) == [], finished
    assert differences(outcome(alone), outcome(tmp_path / "run")) == []


def test_no_mpi_library(job: str, alone: Path, tmp_path: Path) -> None:
    """One line says so, and one rank computes the same."""
    finished = without_launcher(job, f"out={tmp_path / 'run'}", env={"MPI4PY_LIBMPI": str(tmp_path / "libmpi.so")})
    assert finished.returncode == COMPLETE, finished
    assert said(finished) == ["mpifed: no MPI library found, running on one rank (pip install 'mpifed[mpi]')"], finished
    assert differences(outcome(alone), outcome(tmp_path / "run")) == []


def test_more_ranks_than_clients(job: str, alone: Path, tmp_path: Path) -> None:
    """Five ranks for two clients: two of the four that train have none. One line says so; the result is the same."""
    finished = run_module(5, "mpifed.run", job, "turns=off", f"out={tmp_path / 'run'}", timeout=LIMIT)
    warning = "mpifed: 2 of 5 ranks have no client to train; use fewer ranks or more clients"
    assert said(finished) == [warning], finished
    assert differences(outcome(alone), outcome(tmp_path / "run")) == []


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_without_a_library(variable: str, job: str, tmp_path: Path) -> None:
    """Each of them would compute the whole run by itself: refused, before a run folder is made."""
    unloadable = {"MPI4PY_LIBMPI": str(tmp_path / "libmpi.so"), variable: "3"}
    refused = without_launcher(job, f"out={tmp_path / 'run'}", env=unloadable)
    assert refused.returncode == BAD_INPUT, refused
    (line,) = refused.stderr.splitlines()
    assert line.startswith("mpifed: no MPI library could be loaded") and "pip install 'mpifed[mpi]'" in line
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_see_each_other(job: str, tmp_path: Path) -> None:
    """A launcher of another kind, or srun without its --mpi type: a world of one rank each."""
    other = "OMPI_COMM_WORLD_SIZE" if mpirun()[1] != "openmpi" else "PMI_SIZE"
    for variable in (other, "SLURM_STEP_NUM_TASKS"):
        refused = without_launcher(job, f"out={tmp_path / 'run'}", env={variable: "11"})
        assert refused.returncode == BAD_INPUT, refused
        assert f"the launcher started 11 processes ({variable})" in refused.stderr
        assert not (tmp_path / "run").exists()


def test_a_serial_run_inside_a_batch_job(job: str) -> None:
    """`SLURM_NTASKS` is set in batch scripts too, and `SLURM_STEP_NUM_TASKS=1` by `srun -n 1`: no false alarm."""
    ran = without_launcher(job, "--dry-run", env={"SLURM_NTASKS": "11", "SLURM_STEP_NUM_TASKS": "1"})
    assert ran.returncode == COMPLETE, ran


def test_a_mistake_is_said_once_however_many_ranks(job: str, tmp_path: Path) -> None:
    refused = run_module(3, "mpifed.run", job, "local.lrr=1", f"out={tmp_path / 'run'}", timeout=LIMIT, check=False)
    assert refused.returncode == BAD_INPUT, refused
    assert len(said(refused)) == 1 and "local.lrr" in said(refused)[0], refused
    assert not (tmp_path / "run").exists()


# --- ends -------------------------------------------------------------------------------------------------------------
def test_a_signal_to_mpirun_stops_all_ranks_after_a_checkpoint(job: str, tmp_path: Path) -> None:
    """USR1 reaches every rank through the launcher; the round is finished, and the exit code asks to be requeued."""
    run = tmp_path / "run"
    args = ["-m", "mpifed.run", job, f"out={run}", "rounds=100000", "checkpoint.every_rounds=0"]
    with Launch(3, args) as running:
        _until(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size > 0, running)
        shared = _shared_memory(running, ranks=3)
        running.signal(signal.SIGUSR1)
        stopped = running.wait(LIMIT)
    assert stopped.returncode == REQUEUE, stopped
    assert len(list((run / "checkpoints").glob("round_*"))) == 1
    assert not [path for path in shared if path.exists()]


def test_an_abort_ends_every_rank_and_leaves_no_shared_memory() -> None:
    """Rank 1 aborts with code 7 as the others wait for it; MPICH itself does not remove its file then."""
    program = (
        "import time; from mpifed.comm.mpi import Mpi; comm = Mpi(); comm.barrier();"
        "print('here', flush=True);"
        "time.sleep(3 if comm.rank == 1 else 0); comm.rank == 1 and comm.abort(7); comm.barrier()"
    )
    with Launch(3, ["-c", program]) as running:
        _until(lambda: running.output().count("here") == 3, running)
        shared = _shared_memory(running, ranks=3)
        ended = running.wait(30)
    assert ended.returncode == 7, ended
    assert running.processes() == []
    assert not [path for path in shared if path.exists()]


def _until(condition: Callable[[], bool], running: Launch) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert running.running() and time.monotonic() < deadline, running.output()
        time.sleep(0.02)


def _shared_memory(running: Launch, ranks: int) -> set[Path]:
    """The files in /dev/shm that the ranks of a launch have mapped."""
    lines: list[str] = []
    for rank in range(ranks):
        lines += Path(f"/proc/{running.rank_pid(rank)}/maps").read_text().splitlines()
    return {Path(line.split()[5]) for line in lines if "/dev/shm/" in line}
