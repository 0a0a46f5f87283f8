"""SIGKILL at named places and at random times: the job ends, goes on, and equals the undisturbed run bit for bit.

CI's sample of `benchmarks/kills.py`: every step of the checkpoint's commit, some places of the round, both places of
the resume, three random kills and one of all ranks at once. Which rank dies, and in which round, changes from test to
test. `--sweep` runs everything.
"""

from __future__ import annotations

import pytest

from benchmarks.kills import Sweep, cases

POINTS = [
    ("client.after", 3, 2),
    ("server.after", 2, 0),
    ("checkpoint.file_open", 1, 1),
    ("checkpoint.file_written", 3, 0),
    ("checkpoint.agreed", 5, 2),
    ("checkpoint.manifest_written", 3, 0),
    ("checkpoint.renamed", 1, 0),
    ("checkpoint.pruned", 4, 0),
]


@pytest.mark.parametrize(("name", "round_", "rank"), POINTS, ids=lambda value: str(value))
def test_a_kill_at_a_fail_point_costs_no_more_than_a_round(
    broken_runs: Sweep, name: str, round_: int, rank: int
) -> None:
    broken_runs.point(name, round_, rank)
    _assert_equal(broken_runs)


@pytest.mark.parametrize(("name", "rank"), [("resume.found", 1), ("resume.loaded", 0)])
def test_a_second_kill_during_the_resume_costs_nothing(broken_runs: Sweep, name: str, rank: int) -> None:
    broken_runs.resume(name, 3, rank)
    _assert_equal(broken_runs)


@pytest.mark.parametrize("number", range(3))
def test_a_kill_at_a_random_time_costs_no_more_than_a_round(broken_runs: Sweep, number: int) -> None:
    broken_runs.random(number)
    _assert_equal(broken_runs)


def test_all_ranks_killed_at_once(broken_runs: Sweep) -> None:
    broken_runs.random(0, victims=[0, 1, 2])
    _assert_equal(broken_runs)


def test_the_whole_sweep(broken_runs: Sweep, sweep: bool) -> None:
    """With `--sweep`; without it, the fail-points that no rank reaches."""
    for name, run in cases(broken_runs, sample=False, random=100):
        if sweep or name == "unreached":
            run()
            _assert_equal(broken_runs)


def _assert_equal(runs: Sweep) -> None:
    result = runs.results[-1]
    assert result.equal, f"{result}\nseed {runs.seed}: benchmarks/kills.py --seed {runs.seed} --case '{result.case}'"
