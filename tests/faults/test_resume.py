"""What may be resumed, and what it leads to: a run is what its job says, however often it was interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.kills import JOB, Sweep
from mpifed.errors import BAD_INPUT, CHECKPOINT
from tests.faults.outcome import Outcome, differences
from tests.launch import Finished, run_module

LIMIT_S = 60.0


@pytest.fixture
def complete(broken_runs: Sweep, tmp_path: Path) -> Path:
    """A copy of the undisturbed run, with the checkpoints of all its rounds."""
    return shutil.copytree(broken_runs.folder / "undisturbed_3", tmp_path / "run")


def resume(folder: Path, *overrides: str, ranks: int = 1, check: bool = True) -> Finished:
    return run_module(ranks, "mpifed.run", "--resume", folder, *overrides, timeout=LIMIT_S, check=check)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_complete_run_stays_what_it_is(broken_runs: Sweep, complete: Path) -> None:
    resume(complete, ranks=3)
    assert differences(broken_runs.expected, Outcome.read(complete)) == []


def test_a_torn_checkpoint_costs_a_round(broken_runs: Sweep, complete: Path) -> None:
    newest = complete / "checkpoints/round_000005"
    torn = newest / "rank_0001.h5"
    torn.write_bytes(torn.read_bytes()[:-1000])
    finished = resume(complete, ranks=3)
    assert finished.stderr.count(f"checkpoint {newest} is damaged (rank_0001.h5 has ") == 1, finished
    assert finished.stderr.count("mpifed") == 1, finished
    assert "resumed after round 4 of 5" in finished.stdout
    assert differences(broken_runs.expected, Outcome.read(complete)) == []
    assert (complete / "checkpoints/round_000005.1").is_dir(), "never over an old name"


def test_a_run_without_a_usable_checkpoint_does_not_start_from_nothing(complete: Path) -> None:
    for manifest in complete.glob("checkpoints/*/manifest.json"):
        manifest.write_bytes(b"{}")
    before = contents(complete)
    finished = resume(complete, check=False)
    assert finished.returncode == CHECKPOINT, finished
    assert "none of the 5 checkpoints" in finished.stderr and "Traceback" not in finished.stderr, finished
    assert contents(complete) == before


def test_more_rounds_are_the_longer_run(broken_runs: Sweep, tmp_path: Path) -> None:
    """Three rounds, and then up to five: the undisturbed run of five."""
    run_module(1, "mpifed.run", JOB, f"out={tmp_path / 'run'}", "rounds=3", timeout=LIMIT_S)
    resume(tmp_path / "run", "rounds=5")
    assert differences(broken_runs.expected, Outcome.read(tmp_path / "run")) == []


@pytest.mark.parametrize(("override", "named"), [("seed=4", "seed (3 -> 4)"), ("rounds=3", "rounds: 5 rounds")])
def test_another_run_is_refused_and_nothing_is_changed(complete: Path, override: str, named: str) -> None:
    before = contents(complete)
    finished = resume(complete, override, ranks=2, check=False)
    assert finished.returncode == BAD_INPUT, finished
    assert finished.stderr.count("mpifed: ") == 1 and named in finished.stderr, finished
    assert contents(complete) == before
