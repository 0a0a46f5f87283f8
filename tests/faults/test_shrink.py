"""`on_rank_death = "shrink"`: the ranks that live go on, and the run is the undisturbed one, bit for bit.

CI's sample of `benchmarks/deaths.py`, in one start of it with Open MPI (the fixture `open_mpi`); `--sweep` runs all.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kills import JOB
from mpifed.errors import BAD_INPUT
from tests.launch import ROOT, in_environment, mpirun, run_module

LIMIT_S = 600
SAMPLE = ("shrink 0", "twice 0", "hang", "server", "raise")


@pytest.fixture(scope="module")
def deaths(open_mpi: str, sweep: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the benchmark has written: `cases`, and its output as `said`."""
    results = tmp_path_factory.mktemp("deaths") / "deaths.json"
    size = [] if sweep else ["--kills", "1", "--ranks", "4", *(word for case in SAMPLE for word in ("--case", case))]
    command = [open_mpi, str(ROOT / "benchmarks/deaths.py"), "--json", str(results), *size]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    limit = 3600 if sweep else LIMIT_S
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    assert results.exists(), done.stdout + done.stderr
    return json.loads(results.read_text()) | {"said": done.stdout + done.stderr}


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("part", [case.split()[0] for case in SAMPLE])
def test_ranks_die_and_the_run_is_the_same(deaths: dict[str, Any], part: str) -> None:
    """A client rank killed at a random time, two of them, one that hangs; the server, and an exception, after which the
    run is resumed."""
    cases = [case for case in deaths["cases"] if case["case"].split()[0] == part]
    assert cases and all(case["equal"] for case in cases), deaths["said"]
    if part in ("shrink", "twice", "hang"):
        assert all(0 < seconds < 60 for case in cases for seconds in case["recover"]), deaths["said"]


def test_it_is_refused_where_ranks_cannot_outlive_others(tmp_path: Path) -> None:
    finished = run_module(
        2, "mpifed.run", JOB, f"out={tmp_path / 'run'}", "on_rank_death=shrink", timeout=60, check=False
    )
    check_refused(finished.returncode, finished.stderr, tmp_path)


@pytest.mark.skipif(mpirun()[1] == "openmpi", reason="the test before this one has shown it")
def test_open_mpi_without_ulfm_is_refused_too(open_mpi: str, tmp_path: Path) -> None:
    code = (
        "import json, sys; from tests.launch import run_module as run; task = json.load(sys.stdin); "
        "done = run(2, 'mpifed.run', *task['args'], timeout=60, check=False); "
        "print(json.dumps([done.returncode, done.stderr]))"
    )
    args = [str(JOB), f"out={tmp_path / 'run'}", "on_rank_death=shrink"]
    check_refused(*json.loads(in_environment(open_mpi, code, {"args": args})), tmp_path)


def check_refused(code: int, stderr: str, folder: Path) -> None:
    assert code == BAD_INPUT, stderr
    assert stderr.count("on_rank_death: 'shrink' needs Open MPI 5 or newer under mpirun --with-ft ulfm") == 1, stderr
    assert "Traceback" not in stderr and list(folder.iterdir()) == []
