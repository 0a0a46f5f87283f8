"""The report on made-up runs: complete, incomplete and damaged ones side by side."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpifed.__main__ import main as mpifed_main
from mpifed.errors import BAD_INPUT
from mpifed.report.command import main
from mpifed.report.figures import draw
from mpifed.report.runs import read_run, read_runs
from mpifed.report.table import text_table
from mpifed.storage.record import LEDGER, PartitionRecord, write_record
from mpifed.storage.run_folder import RunFolder
from mpifed.storage.summary import summarise

COLUMNS = 14


def make_run(
    path: Path,
    algorithm: str,
    rounds: int = 20,
    done: int = 20,
    payload: int = 1000,
    clients: int = 10,
    classes: int = 10,
) -> RunFolder:
    """A run of `rounds` rounds with `payload` bytes each way; complete where all are `done`.

    The accuracy of round t is t/100, evaluated in even rounds; client 4 is absent in round 3; a round takes 0.5 s.
    """
    folder = RunFolder.create(
        path, f'seed = 1\nrounds = {rounds}\n[algorithm]\nname = "{algorithm}"\n[data]\nname = "digits"\n'
    )
    rows: list[dict[str, Any]] = [
        {
            "round": t,
            "accuracy": t / 100 if t % 2 == 0 else None,
            "absent": [{"client": 4, "reason": "non-finite update"}] if t == 3 else [],
            "bytes": {"logical": {"up": payload, "down": payload}, "mpi": {"sent": payload, "received": payload}},
            "seconds": {"total": 0.5, "train": 0.25},
        }
        for t in range(1, done + 1)
    ]
    for row in rows:
        folder.append_metrics(row)
    if done < rounds:
        return folder
    histogram = np.arange(clients * classes).reshape(clients, classes)
    train = [np.arange(count) for count in histogram.sum(1)]
    partition = PartitionRecord(train, histogram, sha256=f"{clients}x{classes}")
    times = [[t, rank, 0.1, 0.2, 0.1, 0.0, 0.0] for t in range(1, done + 1) for rank in range(3)]
    write_record(folder.record, rows, {name: [] for name in LEDGER}, partition, {"ranks": 3}, times)
    folder.write_summary(
        summarise(
            algorithm=algorithm,
            model="mlp",
            data="digits",
            partition_sha256=partition.sha256,
            clients=clients,
            ranks=3,
            seed=1,
            job_sha256="j",
            parameters=7,
            metrics_rows=rows,
            bytes_by_kind={"down.model": payload * done, "up.update": payload * done},
        )
    )
    return folder


def cells_of(table: str, name: str) -> list[str]:
    """The cells of a run's line: columns are at least two blanks apart."""
    line = next(line for line in table.splitlines() if line.split()[:1] == [name])
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_three_runs_make_rows_files_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a: 20 rounds, last accuracy 0.20, the last ten evaluations are 2..20 % (mean 11 %), 20 x 1 MB each way."""
    make_run(tmp_path / "a", "fedavg", payload=10**6)
    make_run(tmp_path / "b", "fedkd", payload=10**5, clients=100)
    make_run(tmp_path / "c", "fd", done=12, payload=400)
    out = tmp_path / "out"
    assert main([str(tmp_path / name) for name in "abc"] + ["--out", str(out)]) == 0
    table = capsys.readouterr().out
    expected = ["a", "fedavg", "digits", "3", "20", "20.00", "20.00", "11.00"]
    assert cells_of(table, "a") == [*expected, "20.0", "20.0", "20.0", "10.0", "1", "complete"]
    assert cells_of(table, "c")[-1] == "incomplete, 12 of 20 rounds"
    assert {path.name for path in out.iterdir()} == {
        *("accuracy.png", "bytes.png", "time.png", "partition-a.png", "partition-b.png", "report.csv", "report.md"),
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    page = (out / "report.md").read_text()
    for path in out.glob("*.png"):
        assert f"({path.name})" in page
    assert "| a | fedavg |" in page and "client 4 in round 3" in page
    with (out / "report.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows["a"]["accuracy_final"] == "0.2" and rows["b"]["logical_up"] == "2000000" and rows["c"]["ranks"] == ""


def test_lines_are_aligned(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "fedavg")
    make_run(tmp_path / "a-longer-name", "fd", done=3)
    header, rule, *lines = text_table(read_runs([tmp_path / "a", tmp_path / "a-longer-name"])).splitlines()
    starts = [index for index in range(len(rule)) if rule[index] == "-" and (index == 0 or rule[index - 1] == " ")]
    assert len(starts) == COLUMNS
    for line in (header, *lines):
        assert all(line[start - 2 : start] == "  " for start in starts[1:])


def test_one_run_is_reported_inside_its_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "fedavg")
    assert main([str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "report" / "report.md").read_text().startswith("# Run a\n")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    make_run(tmp_path / "x" / "run", "fedavg")
    make_run(tmp_path / "y" / "run", "fedavg")
    names = [run.name for run in read_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"])]
    assert names[0].endswith("x/run") and names[1].endswith("y/run")


@pytest.mark.parametrize(
    ("file", "content", "state"),
    [
        ("run.h5", b"garbage", "complete, damaged run.h5"),
        ("summary.json", b"garbage", "incomplete, 20 of 20 rounds, damaged summary.json"),
        ("summary.json", b'{"complete": "yes", "bytes": 3}', "incomplete, 20 of 20 rounds"),
        ("summary.json", b'{"complete": true, "rounds": 20, "bytes": {"logical": [1]}, "ranks": []}', "complete"),
        ("metrics.jsonl", b"garbage\n{}\n", "complete, damaged metrics.jsonl"),
        ("metrics.jsonl", b'{"round": 1}\n', "complete, damaged metrics.jsonl"),
        ("metrics.jsonl", b'{"round": 20, "accuracy": "x", "absent": [3], "bytes": [], "seconds": null}\n', "complete"),
        ("metrics.jsonl", b'{"round": 20, "absent": 7}\n', "complete, damaged metrics.jsonl"),
        ("job.toml", b"\xff = [", "complete, damaged job.toml"),
        ("job.toml", b'rounds = "x"\nalgorithm = 3', "complete"),
    ],
)
def test_damage_is_a_row_not_an_exception(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes, state: str
) -> None:
    folder = make_run(tmp_path / "bad", "fedavg")
    (folder.path / file).write_bytes(content)
    assert main([str(tmp_path / "bad"), "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert cells_of(table, "bad")[-1] == state
    assert ("damaged" in state) == (f"note: {folder.path / file}" in table)
    assert ("damaged" in state) == ("What could not be read" in (tmp_path / "out" / "report.md").read_text())


def test_a_run_without_a_round_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "new", "fedavg", done=0)
    assert main([str(tmp_path / "new")]) == 0
    assert cells_of(capsys.readouterr().out, "new")[-1] == "incomplete, 0 of 20 rounds"


def test_curves_add_up_rounds_that_were_not_evaluated(tmp_path: Path) -> None:
    """Rounds 2 and 4 of 5 are evaluated; until then 2 x 2 and 4 x 2 payloads of 1000 bytes and 1 s and 2 s."""
    curve = read_run(make_run(tmp_path / "a", "fedavg", rounds=9, done=5).path).curve()
    assert {name: values.tolist() for name, values in curve.items()} == {
        "accuracy": [0.02, 0.04],
        "round": [2, 4],
        "bytes": [4000, 8000],
        "seconds": [1.0, 2.0],
    }


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (61, 3), (3, 100)])
def test_every_size_of_partition_is_drawn(tmp_path: Path, clients: int, classes: int) -> None:
    run = read_run(make_run(tmp_path / "a", "fedavg", clients=clients, classes=classes).path)
    assert "partition-a.png" in [path.name for _, path in draw([run], tmp_path)]


def test_another_folder_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mpifed_main(["report", str(tmp_path)]) == BAD_INPUT
    assert "holds no job.toml" in capsys.readouterr().err


def test_a_report_loads_neither_torch_nor_mpi() -> None:
    code = "import sys, mpifed.report.command, mpifed.report.figures; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "mpi4py", "mpifed.engine", "matplotlib.pyplot"} & set(modules)
