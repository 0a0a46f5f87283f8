"""The report of a sweep on made-up runs: means, deviations, published numbers, and what is said to be missing."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_context

from mpifed.__main__ import main as mpifed_main
from mpifed.errors import BAD_INPUT
from mpifed.report.command import main
from mpifed.report.layout import Cell, Table, as_latex, as_markdown, as_text
from mpifed.report.runs import read_run
from mpifed.report.sweep import Metric, read_results, tables
from mpifed.report.sweep_figures import Line, curves_figure
from mpifed.storage.run_folder import RunFolder
from mpifed.storage.summary import summarise
from mpifed.sweep.plan import Member, Sweep, read_sweep
from mpifed.sweep.state import validate

SWEEP = """
title = "Digits"
seeds = [0, 1]
metric = ["final", "best5"]
[grid]
"data.partition.alpha" = [0.1, 1.0]
[[variant]]
label = "FedAvg"
[[variant]]
label = "FedProx"
set = { "algorithm.name" = "fedprox" }
[[published]]
source = "Somebody & al., 2021, Table 1"
metric = "final"
values = { FedAvg = { "0.1" = [90.16, 0.59], "1.0" = 93.8 } }
"""

ROUNDS = 20


def accuracy(member: Member, t: int) -> float:
    """Round t of 20: t/100, 0.3 more for FedProx, 0.1 more for seed 1, 0.2 more for alpha 1."""
    alpha = member.point.get("data.partition.alpha")
    return t / 100 + 0.3 * (member.variant == "FedProx") + 0.1 * (member.seed or 0) + 0.2 * (alpha == 1.0)


def make(member: Member, job: str, done: int = ROUNDS, payload: int = 10**6, **columns: Callable[[int], Any]) -> None:
    """A member's run folder of `done` rounds, complete where these are all; a round takes half a second."""
    folder = RunFolder.create(member.folder.path, job)
    rows = [
        {
            "round": t,
            "accuracy": accuracy(member, t),
            "bytes": {"logical": {"up": payload, "down": payload}, "mpi": {"sent": payload, "received": payload}},
            "seconds": {"total": 0.5},
        }
        | {name: value(t) for name, value in columns.items()}
        for t in range(1, done + 1)
    ]
    for row in rows:
        folder.append_metrics(row)
    if done < ROUNDS:
        return
    folder.write_summary(
        summarise(
            algorithm="fedavg",
            model="mlp",
            data="digits",
            partition_sha256="p",
            clients=10,
            ranks=2,
            seed=member.seed or 0,
            job_sha256=f"hash of {member.name}",
            parameters=7,
            metrics_rows=rows,
            bytes_by_kind={"down.model": payload, "up.update": payload},
        )
    )


def sweep_of(tmp_path: Path, text: str = SWEEP) -> tuple[Sweep, dict[str, str]]:
    """A sweep and the canonical job texts of its members."""
    path = tmp_path / "mine.toml"
    path.write_text(f'out = "{tmp_path / "out"}"\n{text}', encoding="utf-8")
    sweep = read_sweep(path)
    return sweep, {name: job.to_toml() for name, job in validate(sweep.members).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    sweep, jobs = sweep_of(tmp_path_factory.mktemp("whole"))
    for member in sweep.members:
        make(member, jobs[member.name])
    return sweep


def texts(table: Table) -> dict[str, list[str]]:
    """Cells of a table by the first of each row."""
    return {row[0].text.strip(): [cell.text for cell in row[1:]] for row in table.rows}


# --- tables -----------------------------------------------------------------------------------------------------------
def test_means_and_population_deviations(whole: Sweep) -> None:
    """FedAvg, alpha 0.1: seeds end at 0.20 and 0.30: mean 25 %, deviation 5 % (divided by 2, not by 1).

    best5 pools the last five rounds of both seeds: 0.16 .. 0.20 and 0.26 .. 0.30: mean 23 %; the deviation is
    sqrt(0.05^2 + (0 + 1 + 1 + 4 + 4)/5 * 0.01^2) = sqrt(0.0027) = 5.196 %. The values of alpha 1 lie 20 % higher.
    """
    final, best5, cost = tables(read_results(whole))
    assert texts(final) == {
        "FedAvg": ["25.00 ± 5.00", "45.00 ± 5.00"],
        "published [1]": ["90.16 ± 0.59", "93.80"],
        "FedProx": ["55.00 ± 5.00", "75.00 ± 5.00"],
    }
    assert [cell.strong for cell in final.rows[0]] == [False] * 3
    assert [cell.strong for cell in final.rows[2]] == [False, True, True]
    assert final.notes == ["Mean ± population standard deviation over 2 seeds.", "[1] Somebody & al., 2021, Table 1"]
    assert texts(best5)["FedAvg"] == ["23.00 ± 5.20", "43.00 ± 5.20"]
    assert "published [1]" not in texts(best5)
    assert texts(cost)["FedAvg"] == ["20", "20.0", "20.0", "20.0", "10.0"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    """One member of each cell of alpha 0.1 is not there, one of alpha 1 is unfinished, one is of another job."""
    sweep, jobs = sweep_of(tmp_path)
    kinds = dict(zip([member.name for member in sweep.members], "cc-cuc?c", strict=True))
    for member in sweep.members:
        kind = kinds[member.name]
        if kind == "?":
            make(member, jobs[member.name].replace("clients = 10", "clients = 11"))
        elif kind != "-":
            make(member, jobs[member.name], done=12 if kind == "u" else ROUNDS)
    results = read_results(sweep)
    assert results.missing == {
        "FedAvg-alpha1.0-seed0": "not started",
        "FedProx-alpha0.1-seed0": "incomplete, 12 of 20 rounds",
        "FedProx-alpha1.0-seed0": "its folder holds another job: clients 11, not 10",
    }
    final = next(tables(results))
    assert texts(final)["FedProx"] == ["60.00 (1 of 2)", "80.00 (1 of 2)"]
    assert texts(final)["FedAvg"] == ["25.00 ± 5.00", "50.00 (1 of 2)"]
    assert not any(cell.strong for row in final.rows for cell in row)
    assert final.notes[-1].startswith("Missing: 3 of 8 members (FedAvg-alpha1.0-seed0, ")
    assert main([str(tmp_path / "mine.toml")]) == 0
    page = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "5 of 8 members of the sweep are complete" in page
    assert "- its folder holds another job: clients 11, not 10: FedProx-alpha1.0-seed0" in page
    assert "3 of 8 members are missing" in page


def test_nothing_complete_is_a_table_of_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, jobs = sweep_of(tmp_path)
    make(sweep.members[0], jobs[sweep.members[0].name], done=3)
    assert main([str(tmp_path / "mine.toml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("FedAvg")).split() == ["FedAvg", "-", "-"]
    assert lines[-1].endswith("table and 0 figures")


def test_other_grid_keys_make_tables_of_their_own(tmp_path: Path) -> None:
    """The first key makes the columns, or the one named; published numbers stand only where they hold."""
    text = SWEEP.replace("[[variant]]", "participation = [0.5, 1.0]\n[[variant]]", 1)
    text = text.replace('metric = ["final", "best5"]', 'metric = "final"').replace(
        'metric = "final"\nvalues', "where = { participation = 0.5 }\nvalues"
    )
    sweep, jobs = sweep_of(tmp_path, text)
    for member in sweep.members:
        make(member, jobs[member.name], payload=10**6 * (2 if member.point["data.partition.alpha"] == 1.0 else 1))
    half, half_cost, full, _ = tables(read_results(sweep))
    assert half.title.endswith("participation = 0.5") and full.title.endswith("participation = 1.0")
    assert "published [1]" in texts(half) and "published [1]" not in texts(full)
    assert [cell.text for cell in half_cost.rows[1]] == ["FedAvg", "1.0", "20", "40.0", "40.0", "40.0", "10.0"]
    sweep, _ = sweep_of(tmp_path, text.replace("seeds", 'columns = "participation"\nseeds').partition("[[published")[0])
    assert next(tables(read_results(sweep))).columns_title == "participation"


def test_a_bound_is_never_the_best(tmp_path: Path) -> None:
    sweep, jobs = sweep_of(tmp_path, SWEEP.replace('label = "FedProx"', 'label = "FedProx"\nbound = true'))
    sweep_2, _ = sweep_of(tmp_path, SWEEP.replace("[[published]]", '[[variant]]\nlabel = "Other"\n[[published]]'))
    for member in sweep.members:
        make(member, jobs[member.name])
    assert not any(cell.strong for row in next(tables(read_results(sweep))).rows for cell in row)
    final = next(tables(read_results(sweep_2)))  # a whole variant is missing: no best
    assert texts(final)["Other"] == ["-", "-"] and not any(cell.strong for row in final.rows for cell in row)


def test_without_a_grid_there_is_one_column(tmp_path: Path) -> None:
    sweep, jobs = sweep_of(tmp_path, 'metric = ["train_loss", "accuracy.last10", "accuracy_own"]')
    make(sweep.members[0], jobs["run"], train_loss=lambda t: 1 / t, accuracy_own=lambda t: 0.9)
    loss, last10, own, _ = tables(read_results(sweep))
    assert (loss.header, texts(loss)) == (["", "final"], {"fedgen": ["0.05"]})
    assert texts(last10) == {"fedgen": ["15.50"]}  # the mean of 0.11 .. 0.20
    assert texts(own) == {"fedgen": ["90.00"]} and own.title.startswith("mine: accuracy_own (%)")
    assert last10.notes == ["1 seed."]


@pytest.mark.parametrize(
    ("text", "column", "statistic", "values"),
    [
        ("final", "accuracy", "final", [0.2]),
        ("best", "accuracy", "best", [0.2]),
        ("accuracy_own", "accuracy_own", "final", [0.8]),
        ("accuracy_own.best5", "accuracy_own", "best5", [0.95, 0.96, 0.97, 0.98, 0.99]),
        ("bytes.logical.up", "bytes.logical.up", "final", [10**6]),
        ("nothing", "nothing", "final", []),
    ],
)
def test_metrics(tmp_path: Path, text: str, column: str, statistic: str, values: list[float]) -> None:
    """`accuracy_own` falls from 0.99 to 0.80, and round 20 is its last."""
    sweep, jobs = sweep_of(tmp_path, "")
    make(sweep.members[0], jobs["run"], accuracy_own=lambda t: (100 - t) / 100)
    metric = Metric.parse(text)
    assert (metric.column, metric.statistic) == (column, statistic)
    assert metric.values(read_run(sweep.members[0].folder.path)) == pytest.approx(values)


@pytest.mark.parametrize(
    ("metric", "mean", "std", "text"),
    [
        ("final", 0.91304, 0.00739, "91.30 ± 0.74"),
        ("final", 0.5, None, "50.00"),
        ("train_loss", 0.331049, 0.002546, "0.3310 ± 0.0025"),
        ("train_loss", 1234.5, 67.8, "1234 ± 68"),
        ("train_loss", 2.5, 0.0, "2.5 ± 0"),
        ("train_loss", 1234567.0, None, "1.235e+06"),
    ],
)
def test_numbers_are_as_long_as_their_deviation(metric: str, mean: float, std: float | None, text: str) -> None:
    assert Metric.parse(metric).text(mean, std) == text


# --- the command ------------------------------------------------------------------------------------------------------
def test_the_command_writes_every_form(whole: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the folder alone too, once the sweep has been run there."""
    whole.save()
    assert main([str(whole.folder), "--out", str(tmp_path / "r")]) == 0
    said = capsys.readouterr().out
    assert "FedProx          55.00 ± 5.00*  75.00 ± 5.00*" in said
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {
        *("report.md", "report.tex", "report.csv"),
        *(f"accuracy-{axis}.{suffix}" for axis in ("bytes", "rounds") for suffix in ("png", "pdf")),
    }
    with (tmp_path / "r" / "report.csv").open() as file:
        rows = {row["member"]: row for row in csv.DictReader(file)}
    assert len(rows) == 8 and float(rows["FedAvg-alpha0.1-seed1"]["final"]) == pytest.approx(0.3)
    assert rows["FedAvg-alpha0.1-seed1"]["job_sha256"] == "hash of FedAvg-alpha0.1-seed1"
    assert rows["FedAvg-alpha1.0-seed1"]["data.partition.alpha"] == "1.0"
    page = (tmp_path / "r" / "report.md").read_text()
    assert "| *published [1]* | *90.16 ± 0.59* | *93.80* |" in page and "**75.00 ± 5.00**" in page
    assert "![Test accuracy against payload sent so far, up and down: mean" in page
    tex = (tmp_path / "r" / "report.tex").read_text()
    assert r"FedProx & \textbf{55.00 $\pm$ 5.00} & \textbf{75.00 $\pm$ 5.00} \\" in tex
    assert r"Somebody \& al." in tex and tex.count(r"\begin{table}") == tex.count(r"\end{table}") == 3


@pytest.mark.parametrize(("form", "words"), [("latex", r"\toprule"), ("markdown", "| --- | --: |")])
def test_other_forms_are_printed(whole: Sweep, capsys: pytest.CaptureFixture[str], form: str, words: str) -> None:
    """Nothing beside the tables is printed; runs that are no sweep have the same forms."""
    whole.save()
    assert main([str(whole.folder), "--format", form]) == 0
    said = capsys.readouterr().out
    assert words in said and "report.md" not in said
    run = whole.members[0].folder.path
    assert main([str(run), "--format", form]) == 0
    assert words.replace(" --: |", "") in capsys.readouterr().out


def test_a_sweep_is_reported_by_itself(whole: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole.save()
    assert mpifed_main(["report", str(whole.folder), str(whole.members[0].folder.path)]) == BAD_INPUT
    assert "is a sweep, which is reported by itself" in capsys.readouterr().err
    (tmp_path / "new.toml").write_text(f'seeds = [1]\nout = "{tmp_path / "nowhere"}"')
    assert mpifed_main(["report", str(tmp_path / "new.toml")]) == BAD_INPUT
    assert "nothing of this sweep has been run" in capsys.readouterr().err


# --- layout -----------------------------------------------------------------------------------------------------------
TABLE = Table(
    "100 % of R&D",
    ["", "a_b"],
    [[Cell("x|y"), Cell("1 ± 2", strong=True)], [Cell("z"), Cell("-")]],
    ["n_1"],
    strong="top",
)


def test_a_table_in_three_forms() -> None:
    assert as_text(TABLE).splitlines() == [
        *("100 % of R&D", "       a_b", "---  ------", "x|y  1 ± 2*", "z        -", "  *: top.", "  n_1"),
    ]
    assert as_markdown(TABLE).splitlines() == [
        *("### 100 % of R&D", "", "|  | a_b |", "| --- | --: |", "| x\\|y | **1 ± 2** |", "| z | - |"),
        *("", "n_1  ", "Bold: top.  "),
    ]
    latex = as_latex(TABLE).splitlines()
    assert r"\caption{100 \% of R\&D. n\_1. Bold: top.}" in latex
    assert r"x$|$y & \textbf{1 $\pm$ 2} \\" in latex and r" & a\_b \\" in latex


# --- figures ----------------------------------------------------------------------------------------------------------
def lines_of(count: int, ends: list[float], factor: float = 1.0) -> list[Line]:
    """Three runs each: 30 rounds that rise to `ends`; each line sends `factor` times what the one before it does."""
    t = np.arange(1, 31, dtype=float)
    rise = 1 - np.exp(-t / 5)
    return [
        Line(f"Method {k}", t, 1000 * factor**k * t, ends[k] * rise, 0.01 * rise, 3, k, False) for k in range(count)
    ]


@pytest.mark.parametrize("axis", ["bytes", "rounds"])
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("count", [1, 2, 16])
def test_names_of_lines_never_overlap(axis: str, factor: float, count: int) -> None:
    """All lines end within one percent: the worst case. Names stay inside the axes, in the order of the lines' ends
    where they stand in one column."""
    lines = lines_of(count, [0.9 + 0.01 * number / count for number in range(count)], factor)
    with rc_context({"font.size": 9}):
        figure = curves_figure([("", lines)], Metric("accuracy", "final"), axis, 1)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    names = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert len(names) == count
    boxes = list(names.values())
    for index, box in enumerate(boxes):
        assert box.x1 <= axes.bbox.x1 + 1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 + 2
        assert not any(box.shrunk(0.98, 0.8).overlaps(other.shrunk(0.98, 0.8)) for other in boxes[index + 1 :])
    if axis == "rounds":
        heights = [names[f"Method {number}"].y0 for number in range(count)]
        assert heights == sorted(heights)


def test_what_sends_nothing_is_a_level_line(tmp_path: Path) -> None:
    lines = lines_of(3, [0.9, 0.8, 0.7])
    silent = Line("local", lines[0].rounds, 0 * lines[0].bytes, lines[0].mean, lines[0].std, 3, 3, True)
    figure = curves_figure([("", [*lines, silent])], Metric("accuracy", "final"), "bytes", 1)
    (axes,) = figure.axes
    assert "local (0 bytes)" in [text.get_text() for text in axes.texts]
    assert any(len(set(line.get_ydata())) == 1 and line.get_color() == silent.colour for line in axes.lines)


@pytest.mark.parametrize("metric", ["accuracy", "train_loss"])
def test_level_lines_are_inside_the_axes(metric: str) -> None:
    """Far above and far below the curves."""
    t = np.arange(1.0, 31.0)
    bounds = [Line(f"bound {end}", t, 0 * t, 0 * t + end, 0 * t, 1, 3, True) for end in (0.01, 0.99)]
    figure = curves_figure([("", [*lines_of(2, [0.6, 0.5]), *bounds])], Metric(metric, "final"), "bytes", 1)
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 0.01 and top > 0.99
