"""SIGUSR1 and SIGTERM: a checkpoint at the next round's end, exit code 75, and the resumed run is the same run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.kills import JOB, Sweep
from mpifed.errors import COMPLETE, REQUEUE
from mpifed.rng import numpy_generator
from mpifed.storage.run_folder import RunFolder
from tests.faults.outcome import Outcome, differences, newest, states, states_by_round
from tests.launch import Finished, Launch, run_module

ROUNDS = 30
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `ROUNDS` rounds that nobody disturbs, with the checkpoints of all rounds."""
    folder = tmp_path_factory.mktemp("long") / "run"
    keep = f"checkpoint.keep={ROUNDS}"
    run_module(1, "mpifed.run", JOB, f"out={folder}", f"rounds={ROUNDS}", keep, timeout=LIMIT_S)
    return folder


@pytest.mark.parametrize(("number", "to"), [(signal.SIGUSR1, "mpirun"), (signal.SIGTERM, "rank 2")])
def test_a_signal_saves_and_asks_for_a_requeue(
    broken_runs: Sweep, long_run: Path, tmp_path: Path, number: int, to: str
) -> None:
    """Twice: at a random time of the run's first third, and as soon as the resumed run computes."""
    folder = tmp_path / "run"
    share = 0.3 * numpy_generator(broken_runs.seed, "signal", number).random()
    after = share * broken_runs.training_s * ROUNDS / 5
    print(f"{signal.Signals(number).name} to {to} {after:.3f} s after the run folder was there")

    arguments = [str(JOB), f"out={folder}", f"rounds={ROUNDS}"]
    stopped = _signalled(arguments, number, to, RunFolder(folder).job.exists, after)
    assert stopped.returncode == REQUEUE, stopped
    first = _check_stopped(folder, long_run, stopped)

    # the summary of the stopped run goes when the resumed one has loaded its state
    stopped = _signalled(["--resume", str(folder)], number, to, lambda: not RunFolder(folder).summary.exists())
    assert stopped.returncode == REQUEUE, stopped
    assert _check_stopped(folder, long_run, stopped) > first

    finished = run_module(1, "mpifed.run", "--resume", folder, timeout=LIMIT_S)
    assert finished.returncode == COMPLETE, finished
    outcome = Outcome.read(folder)
    assert differences(Outcome.read(long_run), outcome) == []
    assert outcome.summary["resumed"] == 2


def _signalled(arguments: list[str], number: int, to: str, ready: Callable[[], bool], after: float = 0.0) -> Finished:
    """A start that gets a signal `after` seconds after it is `ready`."""
    with Launch(3, ["-m", "mpifed.run", *arguments]) as running:
        rank_2 = running.rank_pid(2)
        deadline = time.monotonic() + LIMIT_S
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(after)
        if to == "mpirun":
            running.signal(number)
        else:
            os.kill(rank_2, number)
        return running.wait(LIMIT_S)


def _check_stopped(folder: Path, undisturbed: Path, stopped: Finished) -> int:
    """The round of the checkpoint, which is what the undisturbed run had then; a requeue was asked for once."""
    assert stopped.stdout.count("start it again with --resume") == 1, stopped
    summary = RunFolder(folder).read_summary()
    assert summary is not None and summary["complete"] is False
    found = newest(folder)
    assert found is not None
    assert states(found) == states_by_round(undisturbed)[found.round]
    return found.round
