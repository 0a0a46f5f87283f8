"""The comparison of runs as aligned text, Markdown, CSV, and the page that holds table and figures."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpifed.progress import megabytes, percent
from mpifed.report.foretold import foretold_table
from mpifed.report.layout import Cell, Table, aligned, as_markdown, markdown_row
from mpifed.report.runs import Run
from mpifed.report.traffic import traffic_table
from mpifed.storage.summary import SECONDS

HEADER = (
    *("run", "algorithm", "data", "ranks", "rounds", "final %", "best %", "last 10 %"),
    *("up MB", "down MB", "MPI sent MB", "seconds", "absent", "state"),
)
TEXT_COLUMNS = ("run", "algorithm", "data", "state")
LEGEND = (
    "Accuracy on the test data: after the last round, the best, and the mean of the last ten evaluations. "
    "up and down: payload of all clients after compression; MPI sent: buffers that all ranks handed to MPI. "
    "1 MB = 10^6 bytes."
)


def cells(run: Run) -> list[str]:
    """One run's row under `HEADER`."""
    accuracy, sent = run.totals["accuracy"], run.totals["bytes"]
    return [
        run.name,
        run.algorithm,
        run.data,
        "-" if run.ranks is None else str(run.ranks),
        str(run.totals["rounds"]),
        *(percent(accuracy[name]) for name in ("final", "best", "last10")),
        megabytes(sent["logical"]["up"]),
        megabytes(sent["logical"]["down"]),
        megabytes(sent["mpi"]["sent"]),
        f"{run.totals['seconds']['total']:,.1f}",
        str(len(run.totals["absent"])),
        run.state,
    ]


def text_table(runs: Sequence[Run]) -> str:
    """Aligned plain text: a header, a rule, one line a run; then the notes on what is damaged."""
    left = [column for column, name in enumerate(HEADER) if name in TEXT_COLUMNS]
    lines = aligned([HEADER, *map(cells, runs)], left)
    return "\n".join(lines + [f"note: {note}" for run in runs for note in run.notes])


def runs_table(runs: Sequence[Run]) -> Table:
    """The same for any form that `mpifed.report.layout` knows."""
    notes = [LEGEND, *(f"note: {note}" for run in runs for note in run.notes)]
    return Table("Comparison of runs", HEADER, [[Cell(text) for text in cells(run)] for run in runs], notes, left=3)


def csv_table(runs: Sequence[Run]) -> str:
    """CSV with a header; accuracies are fractions, sizes bytes, times seconds, and what is unknown is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["run", "path", "state", "algorithm", "data", "seed", "ranks", "rounds"]
        + ["accuracy_final", "accuracy_best", "accuracy_last10", "logical_up", "logical_down"]
        + ["mpi_sent", "mpi_received", *(f"seconds_{name}" for name in SECONDS), "absent"]
        + ["wire_source", "wire_sent", "wire_received"]
    )
    for run in runs:
        accuracy, sent, seconds = (run.totals[name] for name in ("accuracy", "bytes", "seconds"))
        writer.writerow(
            [run.name, run.path, run.state, run.algorithm, run.data, run.seed, run.ranks, run.totals["rounds"]]
            + [accuracy["final"], accuracy["best"], accuracy["last10"]]
            + [sent["logical"]["up"], sent["logical"]["down"], sent["mpi"]["sent"], sent["mpi"]["received"]]
            + [*(seconds[name] for name in SECONDS), len(run.totals["absent"])]
            + [sent["wire"][name] for name in ("source", "sent", "received")]
        )
    return file.getvalue()


def page(runs: Sequence[Run], figures: Sequence[tuple[str, Path]]) -> str:
    """The Markdown page: tables, figures (`caption`, file beside the page), absent clients, notes."""
    rule = ["---" if name in TEXT_COLUMNS else "--:" for name in HEADER]
    lines = ["# Comparison of runs" if len(runs) > 1 else f"# Run {runs[0].name}", ""]
    lines += [markdown_row(row) for row in (HEADER, rule, *map(cells, runs))] + ["", LEGEND]
    notes = [note for run in runs for note in run.notes]
    if notes:
        lines += ["", "## What could not be read", "", *(f"- {note}" for note in notes)]
    made = (make(run) for run in runs for make in (traffic_table, foretold_table))
    tables = [table for table in made if table is not None]
    for table in tables:
        lines += ["", as_markdown(table).replace("### ", "## ", 1)]
    for caption, path in figures:
        lines += ["", f"## {caption}", "", f"![{caption}]({path.name})"]
    absent = [line for run in runs for line in _absent_lines(run)]
    if absent:
        lines += ["", "## Absent clients", "", *absent]
    return "\n".join(lines) + "\n"


def _absent_lines(run: Run) -> list[str]:
    """One line a reason, the most frequent first."""
    absent: list[dict[str, Any]] = run.totals["absent"]
    lines = []
    for reason, times in Counter(str(absence["reason"]) for absence in absent).most_common():
        found = [absence for absence in absent if str(absence["reason"]) == reason]
        where = ", ".join(f"client {absence['client']} in round {absence['round']}" for absence in found[:5])
        more = f" and {times - 5} more" if times > 5 else ""
        lines.append(f"- {run.name}: {times} x {reason} ({where}{more})")
    return lines
