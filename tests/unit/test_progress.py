"""Progress on rank 0: few plain lines in a log, a bar on a terminal, a closing block."""

from __future__ import annotations

import io

import pytest

from mpifed import progress
from mpifed.progress import Progress, closing_lines, duration, megabytes


def row(round_: int, **more: object) -> dict:
    return {"round": round_, "accuracy": None, "bytes": {"logical": {"up": 1_000_000, "down": 2_000_000}}, **more}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_one_plain_line_a_slow_round(clock: Clock) -> None:
    """10 s a round; after round 1 of 3 two rounds are left: 20 s. Bytes add up, the last accuracy stays."""
    stream = io.StringIO()
    shown = Progress(3, stream)
    for round_, accuracy in ((1, 0.5), (2, None), (3, 0.75)):
        clock.now += 10
        shown.round(row(round_, accuracy=accuracy, absent=[{"client": 1}] if round_ == 2 else []))
    shown.close()
    assert stream.getvalue().splitlines() == [
        "round 1/3  accuracy 50.00 %  up 1.00 MB  down 2.00 MB  10.0 s/round  20 s left",
        "round 2/3  accuracy 50.00 %  up 2.00 MB  down 4.00 MB  10.0 s/round  1 absent  10 s left",
        "round 3/3  accuracy 75.00 %  up 3.00 MB  down 6.00 MB  10.0 s/round",
    ]


def test_fast_rounds_print_first_last_and_one_every_two_seconds(clock: Clock) -> None:
    """40 rounds of 1/8 s: 2 s are 16 rounds, so rounds 1, 17 and 33, and the last."""
    stream = io.StringIO()
    shown = Progress(40, stream)
    for round_ in range(1, 41):
        clock.now = round_ / 8
        shown.round(row(round_))
    assert [int(line.split("/")[0].split()[1]) for line in stream.getvalue().splitlines()] == [1, 17, 33, 40]


def test_a_resumed_run_counts_what_was_before(clock: Clock) -> None:
    """Two rounds before, one of 5 s now: 3 MB up; 5 s a round, one round left."""
    stream = io.StringIO()
    shown = Progress(4, stream, start_round=2, earlier_rows=[row(1), row(2, accuracy=0.25)])
    clock.now = 5
    shown.round(row(3))
    assert stream.getvalue() == "round 3/4  accuracy 25.00 %  up 3.00 MB  down 6.00 MB  5.00 s/round  5.0 s left\n"


def test_the_bar_shows_the_round_and_keeps_notes() -> None:
    stream = io.StringIO()
    shown = Progress(2, stream, interactive=True)
    shown.round(row(1))
    shown.note("a checkpoint was damaged")
    shown.round(row(2, accuracy=0.5))
    shown.close()
    assert "\na checkpoint was damaged\n" in stream.getvalue().replace("\r", "\n").replace(" \n", "\n")
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith("round 2/2 ") and "accuracy 50.00 %" in last
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.00"), (20_400, "0.0204"), (999_000, "0.999"), (1_230_000, "1.23"), (12.34e6, "12.3"), (1.2284e9, "1,228")],
)
def test_megabytes(count: float, text: str) -> None:
    assert megabytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.23, "0.2 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_closing_lines() -> None:
    summary = {
        "complete": True,
        "rounds": 20,
        "accuracy": {"final": 0.91, "best": 0.9234, "last10": 0.9},
        "bytes": {"logical": {"up": 12.34e6, "down": 5e6}, "mpi": {"sent": 1e6, "received": 2e6}},
        "seconds": {"total": 200.0, "train": 150.0, "communicate": 20.0},
        "absent": [{"round": 1, "client": client, "reason": "x"} for client in (10, 9, 9)],
    }
    assert closing_lines(summary, "runs/a").splitlines() == [
        "accuracy  91.00 % at the end, 92.34 % at best",
        "payload   12.3 MB up, 5.00 MB down (over MPI 1.00 MB sent, 2.00 MB received)",
        "time      3 min 20 s for 20 rounds (training 2 min 30 s, communication 20 s)",
        "absent    3 replies, of clients 9, 10",
        "results   runs/a",
    ]
    summary |= {"complete": False, "accuracy": {"final": None, "best": None, "last10": None}, "absent": []}
    lines = closing_lines(summary, "runs/a").splitlines()
    assert lines[0].startswith("payload") and "--resume" in lines[-2]
