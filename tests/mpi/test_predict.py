"""`mpifed probe` on real ranks, `mpifed predict` from what it measured, the run, and the report that compares them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpifed.errors import BadInput
from mpifed.predict.command import main as predict
from mpifed.predict.compute import Work
from mpifed.predict.measured import Probe
from mpifed.report.command import main as report
from mpifed.storage.record import read_record
from mpifed.storage.run_folder import RunFolder
from tests.launch import run_module

pytestmark = pytest.mark.mpi_skip

RANKS = 3
JOB = [
    *("algorithm.name=fedavg", "clients=8", "rounds=4", "model.name=mlp", "model.hidden=[512]", "local.epochs=8"),
    *("data.partition.name=dirichlet", "data.partition.alpha=0.5", "participation=0.75", "device=cpu"),
]
"""Long enough a round for the noise of a busy machine to stay below a factor of three."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A probe's file of three ranks, and a run of the same job that a prediction was saved for."""
    path = tmp_path_factory.mktemp("predict")
    out = path / "probe.json"
    run_module(RANKS, "mpifed", "probe", *JOB, "--seconds", "0", "--out", str(out), timeout=120)
    run_module(RANKS, "mpifed.run", *JOB, f"out={path / 'run'}", timeout=120)
    assert predict([*JOB, "--ranks", str(RANKS), "--probe", str(out), "--save", str(path / "run")]) == 0
    return path


def test_a_probe_holds_every_collective(folder: Path) -> None:
    found = Probe.read(folder / "probe.json")
    assert len(found.hosts) == RANKS
    assert set(found.curves) == {"broadcast", "scatter", "gather", "reduce", "sum"}
    assert all(0 < seconds < 60 for curve in found.curves.values() for seconds in curve.seconds)
    assert found.compute.client["train"][0].at(Work(10, 300)) > 0
    assert 1.0 <= found.contention < 20


def test_bytes_are_exact_and_seconds_about_right(folder: Path) -> None:
    """Every kind's logical bytes, sent and filled, from the record; and the median round within a factor of three."""
    run = RunFolder.open(folder / "run")
    told = run.read_prediction()
    assert told is not None
    ledger = read_record(run.record).ledger
    for kind, amounts in told["bytes"]["kinds"].items():
        direction, _, name = kind.partition(".")
        if direction == "control":
            continue
        chosen = (ledger["direction"] == direction) & (ledger["kind"] == name)
        found = [int(ledger[column][chosen].sum()) for column in ("logical", "mpi_sent", "mpi_received")]
        assert list(amounts["least"].values()) == list(amounts["most"].values()) == found, kind
    rounds = sorted(row["seconds"]["total"] for row in run.read_metrics()[1:])
    assert 1 / 3 < rounds[len(rounds) // 2] / told["seconds"]["later_rounds"] < 3


def test_the_report_compares(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert report([str(folder / "run"), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Predicted and measured, run" in shown
    row = next(line.split() for line in shown.splitlines() if line.startswith("logical bytes"))
    assert row[2] == row[3] and row[4] == "1.0000"
    assert "seconds of a round" in shown
    assert "Predicted and measured, run" in (tmp_path / "report.md").read_text()


def test_predictions_are_for_the_run_that_they_are_saved_in(folder: Path) -> None:
    with pytest.raises(BadInput, match="--save: .* is a run of another job"):
        predict([*JOB, "seed=5", "--ranks", "3", "--bytes", "--save", str(folder / "run")])


def test_numbers_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict([*JOB, "--ranks", "3", "--nodes", "3", "--bytes", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["seconds"] is None and values["bytes"]["total"]["least"] == values["bytes"]["total"]["most"]
    assert values["memory"]["rank 0"]["process"] > 1e7
