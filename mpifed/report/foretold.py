"""What was predicted of a run (`mpifed predict --save RUN`) beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from mpifed.errors import BadInput
from mpifed.progress import megabytes
from mpifed.report.layout import Cell, Table
from mpifed.report.runs import Run
from mpifed.storage.run_folder import RunFolder
from mpifed.storage.summary import number

PARTS = ("train", "communicate", "server", "checkpoint")


def foretold_table(run: Run) -> Table | None:
    """A row for each quantity that was predicted and is known; None where nothing was predicted, or cannot be read."""
    try:
        prediction = RunFolder(run.path).read_prediction()
    except BadInput:
        return None
    if prediction is None or not run.metrics:
        return None
    rows = [*_bytes(prediction, run), *_seconds(prediction, run)]
    notes = [
        "Predicted before the run, if every client answers. Seconds of a round: the median of all but the first; its "
        "parts are means over all rounds, of the rank that took longest."
    ]
    if not run.complete:
        notes.append("The run is not complete, so that bytes and seconds of all rounds cannot be compared.")
    header = ("quantity", "predicted", "measured", "measured / predicted")
    return Table(f"Predicted and measured, {run.name}", header, rows, notes)


def _bytes(prediction: Mapping[str, Any], run: Run) -> list[list[Cell]]:
    """Of complete runs, of which all rounds are there."""
    if not run.complete:
        return []
    least, most = (
        number(prediction, "bytes", "total", "least", "logical"),
        number(prediction, "bytes", "total", "most", "logical"),
    )
    logical = sum(run.totals["bytes"]["logical"].values())
    if least is None:
        return []
    told = f"{least:,d}" if least == most else f"{megabytes(least)} to {'?' if most is None else megabytes(most)} MB"
    between = most is not None and least <= logical <= most
    ratio = f"{logical / least:.4f}" if least == most and least else "between" if between else "-"
    return [[Cell("logical bytes"), Cell(told), Cell(f"{logical:,d}"), Cell(ratio)]]


def _seconds(prediction: Mapping[str, Any], run: Run) -> list[list[Cell]]:
    if number(prediction, "seconds", "later_rounds") is None:
        return []
    rounds = number(prediction, "rounds") or 1
    later = [value for row in run.metrics[1:] or run.metrics if (value := number(row, "seconds", "total")) is not None]
    pairs = [("seconds of a round", number(prediction, "seconds", "later_rounds"), statistics.median(later or [0.0]))]
    for part in PARTS:
        measured = run.totals["seconds"][part] / max(1, len(run.metrics))
        pairs.append((f"of it {part}" if part != "checkpoint" else part, _share(prediction, part, rounds), measured))
    if run.complete:
        foretold = (number(prediction, "seconds", "total") or 0) + (number(prediction, "seconds", "checkpoint") or 0)
        measured = run.totals["seconds"]["total"] + run.totals["seconds"]["checkpoint"]
        pairs.append(("seconds of all rounds", foretold, measured))
    return [
        [Cell(name), Cell(f"{told:.4g}"), Cell(f"{found:.4g}"), Cell(f"{found / told:.2f}" if told else "-")]
        for name, told, found in pairs
        if told is not None
    ]


def _share(prediction: Mapping[str, Any], part: str, rounds: float) -> float | None:
    value = number(prediction, "seconds", part)
    return None if value is None else value / rounds
