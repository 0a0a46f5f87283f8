"""Exceptions, bad replies, hangs and full disks: the job ends by itself, says why once, and can go on.

Jobs that name an algorithm of `tests.faults.broken` are SCAFFOLD until it breaks, so that a run which was broken,
repaired and resumed has to equal the undisturbed one in everything but the summary, which names the algorithm.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kills import JOB, Sweep
from mpifed.errors import CHECKPOINT, COMPLETE, TOO_FEW_REPLIES, UNEXPECTED
from mpifed.storage.run_folder import RunFolder
from tests.faults.broken import HEALTHY
from tests.faults.outcome import Outcome, differences, newest, states
from tests.launch import Finished, run_module

TRACEBACK = "Traceback (most recent call last)"
LIMIT_S = 120.0
KILLED = 9
"""After an abort MPICH's mpirun may return this, with which it kills the other ranks, instead of the abort's code."""


def start(folder: Path, algorithm: str, *overrides: str, ranks: int = 3) -> Finished:
    name = f"algorithm.name=tests.faults.broken:{algorithm}"
    return run_module(ranks, "mpifed.run", JOB, f"out={folder}", name, *overrides, timeout=LIMIT_S, check=False)


def resume_repaired(folder: Path) -> Finished:
    return run_module(1, "mpifed.run", "--resume", folder, env={HEALTHY: "1"}, timeout=LIMIT_S)


def test_an_exception_of_the_server_ends_the_job(broken_runs: Sweep, tmp_path: Path) -> None:
    finished = start(tmp_path / "run", "BadServer", "algorithm.round=3")
    assert finished.returncode in (UNEXPECTED, KILLED), finished
    assert finished.stderr.count(TRACEBACK) == 1, finished
    assert "mpifed: an error on rank 0 ends the job" in finished.stderr
    assert "ValueError: the server is broken on purpose" in finished.stderr
    resume_repaired(tmp_path / "run")
    assert differences(broken_runs.expected, Outcome.read(tmp_path / "run"), ignore=("summary",)) == []


def test_an_exception_outside_a_client_on_a_worker_ends_the_job(broken_runs: Sweep) -> None:
    broken_runs.action("raise", "client.before", 2, 1)
    assert broken_runs.results[-1].equal, broken_runs.results[-1]


def test_a_hung_rank_is_named_with_its_stacks(broken_runs: Sweep) -> None:
    broken_runs.action("hang", "round.before_upload", 2, 2)
    assert broken_runs.results[-1].equal, broken_runs.results[-1]


def test_a_client_that_leaves_ends_the_job(tmp_path: Path) -> None:
    """`sys.exit(0)` on one rank would leave the others waiting, and must not look like a complete run."""
    finished = start(tmp_path / "run", "BadClients", "algorithm.leaving=[3]")
    assert finished.returncode in (UNEXPECTED, KILLED), finished
    assert "SystemExit" in finished.stderr and finished.stderr.count(TRACEBACK) == 1, finished


def test_a_client_that_writes_into_its_download_ends_the_job(tmp_path: Path) -> None:
    """The next client of its rank would be given what it wrote: results would depend on the number of ranks."""
    finished = start(tmp_path / "run", "BadClients", "algorithm.writing=[3]")
    assert finished.returncode in (UNEXPECTED, KILLED), finished
    assert "client 3 changed 'model' in place" in finished.stderr, finished


def test_a_run_may_take_longer_than_a_round_may(tmp_path: Path) -> None:
    """On one rank no exchange has to wait, and each one gives the watchdog's time anew."""
    finished = run_module(
        1, "mpifed.run", JOB, f"out={tmp_path / 'run'}", "rounds=60", "round_timeout=1.5", "evaluate.every_rounds=0",
        "checkpoint.every_rounds=1", timeout=LIMIT_S,
    )  # fmt: skip
    assert finished.returncode == COMPLETE and finished.seconds > 1.5, finished


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    command = f"{sys.executable} -m mpifed.run {JOB} out={tmp_path / 'run'} rounds=5 | head -n 1"
    subprocess.run(["bash", "-c", command], check=True, timeout=LIMIT_S, capture_output=True)
    assert RunFolder.open(tmp_path / "run").complete


def test_a_hang_of_a_client_shows_where(tmp_path: Path) -> None:
    finished = start(tmp_path / "run", "BadClients", "algorithm.hanging=[3]", "round_timeout=5")
    assert finished.returncode in (UNEXPECTED, KILLED), finished
    assert "came to no exchange for 5 s (round_timeout)" in finished.stderr
    assert "broken.py" in finished.stderr  # the stack


def test_bad_clients_cost_their_own_replies(tmp_path: Path) -> None:
    """Clients 0 (raises), 2 (NaN) and 4 (infinity) of 5 do not count in round 2; in every other round all five do."""
    bad = ("algorithm.raising=[0]", "algorithm.nan=[2]", "algorithm.inf=[4]")
    finished = start(tmp_path / "run", "BadClients", *bad)
    assert finished.returncode == COMPLETE, finished
    outcome = Outcome.read(tmp_path / "run")
    assert [row["replies"] for row in outcome.rows] == [5, 2, 5, 5, 5]
    absent = outcome.rows[1]["absent"]
    assert [gone["client"] for gone in absent] == [0, 2, 4]
    assert absent[0]["reason"] == "ValueError: client 0 is broken on purpose"
    assert all("finite" in gone["reason"] for gone in absent[1:])
    assert [(gone["round"], gone["client"]) for gone in outcome.summary["absent"]] == [(2, 0), (2, 2), (2, 4)]
    assert all(row["loss"] < float("inf") for row in outcome.rows)


def test_too_few_replies_stop_the_run_where_it_can_go_on(broken_runs: Sweep, tmp_path: Path) -> None:
    """All clients are bad in round 3: the state after round 2 stands, and the repaired run equals the undisturbed."""
    bad = ("algorithm.round=3", "algorithm.raising=[0, 1]", "algorithm.nan=[2, 3, 4]")
    finished = start(tmp_path / "run", "BadClients", *bad)
    assert finished.returncode == TOO_FEW_REPLIES, finished
    said = [line for line in finished.stderr.splitlines() if line.startswith("mpifed: ")]
    assert len(said) == 1 and "round 3" in said[0] and "0 usable replies, min_replies is 1" in said[0], finished
    assert "client 0: ValueError: client 0 is broken on purpose" in said[0]
    found = newest(tmp_path / "run")
    assert found is not None and found.round == 2
    assert states(found) == broken_runs.by_round[2]
    resume_repaired(tmp_path / "run")
    assert differences(broken_runs.expected, Outcome.read(tmp_path / "run"), ignore=("summary",)) == []


def test_a_straggler_changes_nothing(broken_runs: Sweep, tmp_path: Path) -> None:
    finished = start(tmp_path / "run", "BadClients", "algorithm.sleeping=[1]")
    assert finished.returncode == COMPLETE, finished
    outcome = Outcome.read(tmp_path / "run")
    assert differences(broken_runs.expected, outcome, ignore=("summary",)) == []
    assert outcome.rows[1]["seconds"]["train"] >= 1.0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_leaves_the_last_checkpoint(broken_runs: Sweep, tmp_path: Path, rank: int) -> None:
    """A rank's checkpoint of more than 2.4 MB does not fit into 2 MB from round 3 on: rank 0 and others alike."""
    full = ("algorithm.round=3", f"algorithm.rank={rank}", "algorithm.size=2000000")
    finished = start(tmp_path / "run", "FullDisk", *full)
    assert finished.returncode == CHECKPOINT, finished
    assert TRACEBACK not in finished.stderr, finished
    path = tmp_path / "run/checkpoints/round_000003.tmp" / f"rank_000{rank}.h5"
    assert finished.stderr.count("mpifed: ") == 1 and str(path) in finished.stderr, finished
    assert sorted(item.name for item in (tmp_path / "run/checkpoints").iterdir()) == ["round_000001", "round_000002"]
    if rank == 0:
        resume_repaired(tmp_path / "run")
        assert differences(broken_runs.expected, Outcome.read(tmp_path / "run"), ignore=("summary",)) == []


def test_an_error_that_one_rank_has_for_itself_ends_the_job(tmp_path: Path) -> None:
    """Rank 2 cannot put away a client's state of 1.2 MB, of which the others learn nothing; they must not wait."""
    full = ("algorithm.rank=2", "algorithm.size=1000000", "client_state_mb=0")
    finished = start(tmp_path / "run", "FullDisk", *full)
    assert finished.returncode in (CHECKPOINT, KILLED), finished
    assert finished.stderr.count("mpifed: rank 2: ") == 1, finished
    assert str(tmp_path / "run/scratch/rank_0002/client_") in finished.stderr
