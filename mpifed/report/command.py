"""`python -m mpifed report RUN... | SWEEP [--out DIR] [--format F]`: compare runs, or the means of a sweep."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mpifed.errors import BadInput
from mpifed.output import say
from mpifed.report.foretold import foretold_table
from mpifed.report.layout import RENDER, Form, as_text
from mpifed.report.runs import read_runs
from mpifed.report.table import csv_table, page, runs_table, text_table
from mpifed.report.traffic import traffic_table
from mpifed.sweep.plan import is_sweep


def main(argv: Sequence[str]) -> int:
    """Print the tables; write them, as `report.md`, `report.csv` and for a sweep `report.tex`, and the figures.

    Returns the exit code. Raises `BadInput` where a folder is neither a run's nor a sweep's, or `--out` cannot be
    written.
    """
    parser = argparse.ArgumentParser(prog="mpifed report", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "runs", metavar="RUN | SWEEP", nargs="+", help="folders of runs, complete or not; or one sweep: file or folder"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder to write (default: report/ inside the folder of one run or a sweep, else ./report)",
    )
    parser.add_argument("--format", choices=tuple(RENDER), default="text", help="of the tables that are printed")
    arguments = parser.parse_args(argv)
    sweeps = [path for path in arguments.runs if is_sweep(path)]
    if sweeps and len(arguments.runs) > 1:
        raise BadInput(f"{sweeps[0]} is a sweep, which is reported by itself; name its members' folders to mix them")
    if sweeps:
        return _report_sweep(sweeps[0], arguments.out, arguments.format)
    return _report_runs(arguments.runs, arguments.out, arguments.format)


def _report_runs(paths: Sequence[str], out: Path | None, form: Form) -> int:
    runs = read_runs(paths)
    _print(text_table(runs) if form == "text" else RENDER[form](runs_table(runs)))
    for table in (traffic_table(runs[0]), foretold_table(runs[0])) if len(runs) == 1 and form == "text" else ():
        if table is not None:
            _print("\n" + as_text(table))
    out = out or (runs[0].path / "report" if len(runs) == 1 else Path("report"))

    from mpifed.report.figures import draw  # after the table, which need not wait for matplotlib

    with _writing(out):
        figures = draw(runs, out)
        (out / "report.csv").write_text(csv_table(runs), encoding="utf-8")
        (out / "report.md").write_text(page(runs, figures), encoding="utf-8")
    _say_where(out, len(figures), form)
    return 0


def _report_sweep(path: str, out: Path | None, form: Form) -> int:
    from mpifed.report import sweep as report
    from mpifed.sweep.plan import read_sweep

    results = report.read_results(read_sweep(path))
    _print(report.document(results, form))
    out = out or results.sweep.folder / "report"

    from mpifed.report.sweep_figures import draw

    with _writing(out):
        figures = draw(results, out)
        (out / "report.csv").write_text(report.members_csv(results), encoding="utf-8")
        (out / "report.tex").write_text(report.document(results, "latex") + "\n", encoding="utf-8")
        (out / "report.md").write_text(report.page(results, figures), encoding="utf-8")
    _say_where(out, len(figures), form)
    return 0


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise BadInput(f"--out: cannot write {out} ({error.strerror}); choose another folder") from None


def _say_where(out: Path, figures: int, form: Form) -> None:
    """Only beneath text: a table in another form is meant for a file."""
    if form == "text":
        _print(f"\n{out / 'report.md'}: table and {figures} figures")


def _print(text: str) -> None:
    say(text + "\n", sys.stdout)
