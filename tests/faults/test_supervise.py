"""`mpifed supervise`: a run of which a rank, the server or the launcher is killed ends as the undisturbed run does.

What a start returns is decided here by the launcher: an `mpirun`, or a program that takes its place.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.kills import JOB, Sweep
from mpifed.errors import BAD_INPUT, COMPLETE, REQUEUE, UNEXPECTED, BadInput
from mpifed.storage.run_folder import RunFolder
from mpifed.supervise import main
from tests.faults.outcome import Outcome, differences
from tests.launch import Finished, Supervised, alive

RANKS = 3
LIMIT_S = 120.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def rounds_done(folder: Path) -> int:
    return len(RunFolder(folder).read_metrics())


@pytest.mark.parametrize("victim", ["worker", "server", "mpirun"])
def test_a_kill_is_cured_by_another_start(broken_runs: Sweep, tmp_path: Path, victim: str) -> None:
    folder = tmp_path / "run"
    with Supervised(RANKS, ["--wait", "0"], [JOB, f"out={folder}"]) as running:
        pid = running.launcher_pid() if victim == "mpirun" else running.rank_pid(1 if victim == "worker" else 0)
        until(lambda: rounds_done(folder) >= 1)
        os.kill(pid, signal.SIGKILL)
        finished = running.wait(LIMIT_S)
    assert finished.returncode == COMPLETE, finished
    assert finished.stderr.count("starting again") == 1, finished
    assert "after round" in finished.stderr and "Traceback" not in finished.stderr, finished
    assert differences(broken_runs.expected, Outcome.read(folder)) == []


def test_a_crash_in_the_same_round_ends_it(tmp_path: Path) -> None:
    """Every start dies in round 2, the first after a checkpoint, the second after none."""
    environment = {"MPIFED_FAILPOINT": "client.after:2:1"}
    with Supervised(2, ["--wait", "0", "--restarts", "0"], [JOB, f"out={tmp_path}"], env=environment) as running:
        finished = running.wait(LIMIT_S)
    assert finished.returncode not in (COMPLETE, BAD_INPUT, REQUEUE), finished
    assert finished.stderr.count("after round 1: starting again") == 1, finished
    assert "1 start in a row has saved nothing new; giving up" in finished.stderr, finished


def test_fewer_ranks_where_the_same_number_saved_nothing(broken_runs: Sweep, tmp_path: Path) -> None:
    """As the last test, and then on one rank, where rank 1 cannot die."""
    environment = {"MPIFED_FAILPOINT": "client.after:2:1"}
    with Supervised(2, ["--wait", "0", "--shrink"], [JOB, f"out={tmp_path}"], env=environment) as running:
        finished = running.wait(LIMIT_S)
    assert finished.returncode == COMPLETE, finished
    heads = [line for line in finished.stdout.splitlines() if "5 clients" in line]
    assert [head.split(", ")[1] for head in heads] == ["2 ranks on 1 node", "2 ranks on 1 node", "1 rank on 1 node"]
    assert differences(broken_runs.expected, Outcome.read(tmp_path)) == []


def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Supervised(RANKS, [], [JOB, f"out={folder}", "rounds=200"]) as running:
        until(lambda: rounds_done(folder) >= 1)
        running.signal(signal.SIGTERM)
        finished = running.wait(LIMIT_S)
    assert finished.returncode == REQUEUE, finished
    assert "as asked to" in finished.stderr and "starting again" not in finished.stderr, finished
    assert finished.stdout.count("start it again with --resume") == 1, finished


# --- launchers that only pretend --------------------------------------------------------------------------------------
@dataclass
class Pretence:
    """`mpifed supervise OPTIONS -- LAUNCHER mpifed.run JOB out=FOLDER`, in this process."""

    folder: Path
    output: pytest.CaptureFixture[str]

    def __call__(self, launcher: Sequence[str | Path], *options: str) -> Finished:
        started = time.monotonic()
        command = [*map(str, launcher), "mpifed.run", str(JOB), f"out={self.folder}"]
        code = main(["--wait", "0", *options, "--", *command])
        said = self.output.readouterr()
        return Finished(code, said.out, said.err, time.monotonic() - started)


@pytest.fixture
def supervise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Pretence:
    return Pretence(tmp_path / "run", capfd)


def test_exit_code_0_is_not_believed(supervise: Pretence) -> None:
    """As an `mpirun` returns that has lost a node."""
    finished = supervise(["true"], "--restarts", "1")
    assert finished.returncode == UNEXPECTED, finished
    assert finished.stderr.count("exit code 0, but the run is not complete") == 2, finished


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (3, 1), (4, 1), (75, 1), (137, 2)])
def test_what_another_start_cannot_cure_is_not_started_again(supervise: Pretence, code: int, starts: int) -> None:
    finished = supervise(["sh", "-c", f"echo started; exit {code}"], "--restarts", "1")
    assert finished.returncode == code, finished
    assert finished.stdout.count("started") == starts, finished


def test_restart_preempted_starts_again_after_75(supervise: Pretence) -> None:
    finished = supervise(["sh", "-c", "echo started; exit 75"], "--restarts", "1", "--restart-preempted")
    assert finished.returncode == REQUEUE and finished.stdout.count("started") == 2, finished


def test_a_command_that_hangs_is_ended_with_its_children(
    supervise: Pretence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child leaves the launcher's process group and ignores its end, as an orphaned rank may."""
    monkeypatch.setattr("mpifed.supervise.LEAVING_S", 1.0)
    launcher = ["sh", "-c", "setsid sh -c 'trap \"\" TERM; echo $$ > $0; sleep 600' $0 & sleep 600", tmp_path / "pid"]
    finished = supervise(launcher, "--restarts", "0", "--patience", "0.5")
    assert finished.returncode == 128 + signal.SIGTERM, finished
    assert f"nothing has changed in {supervise.folder} for" in finished.stderr, finished
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--", "mpirun", "-n", "2", "python", "-m", "mpifed.run", "local.lrr=1"], "local.lrr"),
        (["--", "mpirun", "-n", "2", "python", "-m", "mpifed.run", "--dry-run"], "--dry-run trains nothing"),
        (["--", "no-such-launcher", "-m", "mpifed.run"], "there is no 'no-such-launcher'"),
        (["--", "python", "train.py"], "is no run"),
        ([], "no command"),
    ],
)
def test_what_is_no_run_is_refused(words: list[str], named: str) -> None:
    with pytest.raises(BadInput, match=re.escape(named)):
        main(words)
