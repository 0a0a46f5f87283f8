"""The totals of a run from its rounds: a pure function of metrics and ledger."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LAST = 10
"""`accuracy.last10` is the mean over so many evaluations at the end."""

WIRE = ("sent", "received", "retransmitted")
SECONDS = ("total", "train", "communicate", "evaluate", "server", "checkpoint")


def number(row: Mapping[str, Any], *path: str) -> int | float | None:
    """The finite number at `row[path[0]][path[1]]...`, or None where there is none."""
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def total(rows: Iterable[Mapping[str, Any]], *path: str) -> int | float:
    """The sum of `number(row, *path)` over the rows that have it; 0 for none. Integers stay integers."""
    return sum(value for row in rows if (value := number(row, *path)) is not None)


def measured(metrics_rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the rounds add up to, of a complete or an incomplete run.

    Returns `rounds` (the number of the last one), `accuracy` (fractions; null where no round was evaluated), `bytes`,
    `seconds` and `absent` as `summarise` has them.
    """
    accuracies = [value for row in metrics_rows if (value := number(row, "accuracy")) is not None]
    last = accuracies[-LAST:]
    return {
        "rounds": metrics_rows[-1]["round"] if metrics_rows else 0,
        "accuracy": {
            "final": accuracies[-1] if accuracies else None,
            "best": max(accuracies, default=None),
            "last10": math.fsum(last) / len(last) if last else None,
        },
        "bytes": {
            "logical": {direction: total(metrics_rows, "bytes", "logical", direction) for direction in ("up", "down")},
            "mpi": {direction: total(metrics_rows, "bytes", "mpi", direction) for direction in ("sent", "received")},
            "wire": _wire(metrics_rows),
        },
        "seconds": {name: total(metrics_rows, "seconds", name) for name in SECONDS},
        "absent": [
            {"round": row.get("round"), "client": absence.get("client"), "reason": absence.get("reason")}
            for row in metrics_rows
            for absence in row.get("absent") or ()
            if isinstance(absence, Mapping)
        ],
    }


def _wire(metrics_rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the rounds that were measured, and how many these are; null where none was."""
    rows = [row for row in metrics_rows if number(row, "bytes", "wire", "sent") is not None]
    sources = dict.fromkeys(str(row["bytes"]["wire"].get("source")) for row in rows)
    return {
        "source": " and ".join(sources) or "not measured",
        **{name: total(rows, "bytes", "wire", name) if rows else None for name in WIRE},
        "rounds": len(rows),
    }


def summarise(
    *,
    algorithm: str,
    model: str,
    data: str,
    partition_sha256: str,
    clients: int,
    ranks: int,
    seed: int,
    job_sha256: str,
    parameters: int,
    metrics_rows: Sequence[Mapping[str, Any]],
    bytes_by_kind: Mapping[str, int],
    resumed: int = 0,
    deaths: Sequence[Mapping[str, Any]] = (),
    complete: bool = True,
) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        clients: clients of the federation, `ranks`: MPI ranks, `parameters`: of the evaluated model.
        metrics_rows: one row a round, as in `metrics.jsonl`.
        bytes_by_kind: logical bytes of the run by "direction.kind" (`mpifed.comm.ledger.Ledger.by_kind`).
        resumed: how often the run was resumed.
        deaths: of ranks, that the run went on without (`mpifed.survival.Death`).
    """
    totals = measured(metrics_rows)
    totals["bytes"]["logical"]["by_kind"] = dict(sorted(bytes_by_kind.items()))
    return {
        "complete": complete,
        "algorithm": algorithm,
        "model": model,
        "data": {"name": data, "partition_sha256": partition_sha256},
        "clients": clients,
        "ranks": ranks,
        "seed": seed,
        "parameters": parameters,
        **totals,
        "resumed": resumed,
        "deaths": list(deaths),
        "job_sha256": job_sha256,
    }
