"""One run as a report sees it; what is missing or damaged is said, not raised."""

from __future__ import annotations

import os
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpifed.errors import BadInput
from mpifed.storage.record import Record, read_record
from mpifed.storage.run_folder import RunFolder
from mpifed.storage.summary import measured, number


@dataclass(frozen=True)
class Run:
    """A run folder read for a report.

    `state` is "complete", "incomplete, 12 of 20 rounds" or names the damaged file; `notes` are whole sentences. `job`:
    the tables of `job.toml`, not validated.
    `totals` is `mpifed.storage.summary.measured` of `metrics`, the rows of `metrics.jsonl`. `by_kind`: logical bytes
    by "direction.kind". What could not be read is None or empty.
    """

    path: Path
    name: str
    state: str
    notes: tuple[str, ...]
    algorithm: str
    data: str
    ranks: int | None
    seed: int | None
    metrics: Sequence[dict[str, Any]]
    totals: dict[str, Any]
    by_kind: dict[str, int] = field(default_factory=dict)
    record: Record | None = None
    job: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    def curve(self, column: str = "accuracy") -> dict[str, npt.NDArray[np.float64]]:
        """Accuracy (a fraction), or what another `column` of the metrics holds, of the rounds that have it, with the
        round, and the bytes (logical, up and down) and seconds spent until then; arrays of one length."""
        rows = []
        sent = seconds = 0.0
        for row in self.metrics:
            sent += sum(number(row, "bytes", "logical", direction) or 0 for direction in ("up", "down"))
            seconds += number(row, "seconds", "total") or 0
            value = column_value(row, column)
            if value is not None:
                rows.append((value, row["round"], sent, seconds))
        columns = np.array(rows, np.float64).reshape(-1, 4).T
        return dict(zip((column, "round", "bytes", "seconds"), columns, strict=True))


def column_value(row: Mapping[str, Any], column: str) -> int | float | None:
    """The number in a metrics row under a name, which may be nested as `bytes.logical.up` is; None for none."""
    return number(row, column) if column in row else number(row, *column.split("."))


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read several run folders; runs of one name are called by their paths. Raises `BadInput` for another folder."""
    runs = [read_run(path) for path in paths]
    count = Counter(run.name for run in runs)
    return [replace(run, name=os.path.relpath(run.path)) if count[run.name] > 1 else run for run in runs]


def read_run(path: str | Path) -> Run:
    """Read one run folder, whatever state it is in. Raises `BadInput` where it is no run folder at all."""
    folder = RunFolder.open(path)
    notes: list[str] = []
    damaged: list[str] = []

    def attempt(name: str, read: Any, otherwise: Any) -> Any:
        try:
            return read()
        except (BadInput, OSError, ValueError) as error:  # ValueError: TOML, encoding
            damaged.append(name)
            notes.append(str(error) if isinstance(error, BadInput) else f"{folder.path / name}: {error}")
            return otherwise

    job = attempt("job.toml", lambda: tomllib.loads(folder.job.read_text(encoding="utf-8")), {})
    metrics = attempt("metrics.jsonl", folder.read_metrics, [])
    summary = attempt("summary.json", folder.read_summary, None) or {}
    record = attempt("run.h5", lambda: read_record(folder.record), None) if folder.record.exists() else None

    totals = measured(metrics)
    done, planned = totals["rounds"], number(job, "rounds")
    progress = f"{done} of {planned} rounds" if planned is not None else f"{done} rounds"
    complete = summary.get("complete") is True
    if complete and summary.get("rounds") != done and "metrics.jsonl" not in damaged:
        damaged.append("metrics.jsonl")
        notes.append(f"{folder.metrics}: holds {done} rounds, but summary.json says {summary.get('rounds')}")
    parts = ["complete" if complete else f"incomplete, {progress}"] + [f"damaged {name}" for name in damaged]
    ranks = number(summary, "ranks")
    if ranks is None and record is not None:
        ranks = number(record.provenance, "ranks")
    seed = number(job, "seed")
    kinds = summary.get("bytes", {}) if isinstance(summary.get("bytes"), dict) else {}
    kinds = kinds.get("logical", {}) if isinstance(kinds.get("logical"), dict) else {}
    by_kind = kinds.get("by_kind", {}) if isinstance(kinds.get("by_kind"), dict) else {}
    return Run(
        path=folder.path,
        name=folder.path.resolve().name,
        state=", ".join(parts),
        notes=tuple(notes),
        algorithm=_name(job, "algorithm"),
        data=_name(job, "data"),
        ranks=None if ranks is None else int(ranks),
        seed=None if seed is None else int(seed),
        metrics=metrics,
        totals=totals,
        by_kind={str(kind): int(size) for kind, size in by_kind.items() if isinstance(size, int)},
        record=record,
        job=job,
        complete=complete,
    )


def _name(job: dict[str, Any], table: str) -> str:
    value = job.get(table)
    name = value.get("name") if isinstance(value, dict) else None
    return name if isinstance(name, str) else "?"
