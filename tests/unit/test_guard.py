"""The end of a run's time, and whether there is still time for another round."""

from __future__ import annotations

import math
import time

import pytest

from mpifed.guard import Deadline

NOW = 1_000_000.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


@pytest.mark.parametrize(
    ("limit", "slurm", "at"),
    [
        (0.0, None, math.inf),
        (60.0, None, NOW + 60),
        (0.0, "1000300", NOW + 300),
        (60.0, "1000300", NOW + 60),
        (600.0, "1000300", NOW + 300),
        (0.0, "", math.inf),
    ],
)
def test_the_first_end_counts(limit: float, slurm: str | None, at: float) -> None:
    environment = {} if slurm is None else {"SLURM_JOB_END_TIME": slurm}
    assert Deadline.of(NOW, limit, environment).at == at


def left(seconds: float) -> Deadline:
    return Deadline(NOW + seconds)


def test_without_an_end_it_is_never_near() -> None:
    assert not Deadline().near(1e9)


def test_before_the_first_checkpoint_one_is_taken_to_last_as_long_as_a_round() -> None:
    """A round of 4 s: 1.5 (4 + 4) + 10 = 22 s have to be left."""
    assert left(21.9).near(4.0)
    assert not left(22.1).near(4.0)


def test_what_took_longest_so_far_has_to_fit() -> None:
    """Rounds of 2, 8 and, the present one, 4 s; checkpoints of 2 and 1 s: 1.5 (8 + 2) + 10 = 25 s."""
    for seconds, near in ((24.9, True), (25.1, False)):
        deadline = left(seconds)
        for took in (2.0, 8.0):
            deadline.round_took(took)
        for took in (2.0, 1.0):
            deadline.checkpoint_took(took)
        assert deadline.near(4.0) is near
