"""`python -m mpifed report RUN... [--out DIR]`: compare runs by a table, figures and a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mpifed.errors import BadInput
from mpifed.report.runs import read_runs
from mpifed.report.table import csv_table, page, text_table


def main(argv: Sequence[str]) -> int:
    """Print the table; write `report.md`, `report.csv` and the figures. Returns the exit code.

    Raises `BadInput` where a folder is no run folder, or `--out` cannot be written.
    """
    parser = argparse.ArgumentParser(prog="mpifed report", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, complete or not")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder to write (default: RUN/report for one run, else ./report)"
    )
    arguments = parser.parse_args(argv)
    runs = read_runs(arguments.runs)
    print(text_table(runs), flush=True)
    out = arguments.out or (runs[0].path / "report" if len(runs) == 1 else Path("report"))

    from mpifed.report.figures import draw  # after the table, which need not wait for matplotlib

    try:
        out.mkdir(parents=True, exist_ok=True)
        figures = draw(runs, out)
        (out / "report.csv").write_text(csv_table(runs), encoding="utf-8")
        (out / "report.md").write_text(page(runs, figures), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--out: cannot write {out} ({error.strerror}); choose another folder") from None
    print(f"\n{out / 'report.md'}: table and {len(figures)} figures")
    return 0
