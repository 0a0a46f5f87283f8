"""A real sweep under mpirun: a killed rank, a signal, and a second start that goes on where the members were."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpifed.storage.run_folder import RunFolder
from tests.faults.outcome import Outcome, differences
from tests.launch import Launch, mpirun, run_module

pytestmark = pytest.mark.mpi_skip

LIMIT_S = 240.0
ROUNDS = 60

SWEEP = f"""
seeds = [0, 1]
ranks = 2
parallel = 2
[job]
rounds = {ROUNDS}
clients = 4
model = {{ name = "mlp" }}
data = {{ name = "digits" }}
local = {{ steps = 1 }}
[[variant]]
label = "FedAvg"
[[variant]]
label = "SCAFFOLD"
ranks = 1
set = {{ algorithm.name = "scaffold" }}
"""


@pytest.mark.slow
@pytest.mark.timeout(600)  # nine launches, on a machine that may be busy
def test_a_sweep_that_is_broken_goes_on(tmp_path: Path) -> None:
    """2 methods x 2 seeds, two at once. A rank of the first is killed: the others go on. Then SIGTERM to the sweep:
    the two that run checkpoint. The second start completes all, the same bit for bit as a run that nobody disturbed.
    """
    file = tmp_path / "tiny.toml"
    file.write_text(f'out = "{tmp_path / "out"}"\n{SWEEP}', encoding="utf-8")
    folders = [RunFolder(tmp_path / "out" / f"{label}-seed{seed}") for label in ("FedAvg", "SCAFFOLD") for seed in "01"]

    with _sweep(file) as running:
        _wait(running, lambda: len(folders[0].read_metrics()) > 1)
        os.kill(_rank(running, "FedAvg-seed0"), signal.SIGKILL)
        _wait(running, lambda: "start     SCAFFOLD-seed0" in running.output())
        _wait(running, lambda: len(folders[2].read_metrics()) > 0)
        running.signal(signal.SIGTERM)
        stopped = running.wait(LIMIT_S)
    assert stopped.returncode == 75, stopped
    assert "FAILED    FedAvg-seed0  exit code" in stopped.stdout, stopped
    assert f"log: {tmp_path / 'out' / 'logs' / 'FedAvg-seed0.log'}" in stopped.stdout
    assert "start the sweep again to go on" in stopped.stdout
    assert 0 < len(folders[0].read_metrics()) < ROUNDS

    with _sweep(file) as running:
        finished = running.wait(LIMIT_S)
    assert finished.returncode == 0, finished
    assert "go on     FedAvg-seed0" in finished.stdout and "go on     SCAFFOLD-seed0" in finished.stdout, finished
    assert "4 members in" in finished.stdout and ": 4 complete" in finished.stdout
    summary = folders[0].read_summary()
    assert summary is not None and summary["resumed"] == 1

    job = tmp_path / "out" / "jobs" / "FedAvg-seed0.toml"
    run_module(1, "mpifed.run", job, f"out={tmp_path / 'undisturbed'}", timeout=LIMIT_S)
    assert differences(Outcome.read(tmp_path / "undisturbed"), Outcome.read(folders[0].path)) == []


def _sweep(file: Path) -> Launch:
    """The sweep as a process of its own, of whose members nothing is left behind."""
    options = " --oversubscribe" if mpirun()[1] == "openmpi" else ""
    launch = Launch(1, [])
    launch.command = [sys.executable, "-m", "mpifed", "sweep", str(file), "--run", "--launcher", f"mpirun{options}"]
    return launch


def _wait(running: Launch, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert running.running() and time.monotonic() < deadline, running.output()
        time.sleep(0.002)


def _rank(running: Launch, member: str) -> int:
    """A process that trains this member: a Python that is no launcher."""
    for pid in running.processes():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if words[1:3] == ["-m", "mpifed.run"] and words[3].endswith(f"{member}.toml"):
            return pid
    raise AssertionError(f"no rank of {member}: {running.output()}")
