"""What a run folder holds, in a form that two runs can be compared by: bit for bit, but for times and wire bytes.

`differences(expected, actual)` names what differs. On another number of ranks the bytes that MPI moved differ by
nature, and a client's bytes stand at another rank; everything else has to be the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpifed.comm.inprocess import InProcess
from mpifed.job import load
from mpifed.storage.checkpoint import MANIFEST, Checkpoints, Found, Manifest
from mpifed.storage.record import read_record
from mpifed.storage.run_folder import RunFolder
from mpifed.types import State, leaves

TIMES = "seconds"


def fingerprint(state: State) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors of a state."""
    digest = hashlib.sha256()
    for path, tensor in sorted(leaves(state)):
        digest.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def states(found: Found) -> dict[str, str]:
    """Fingerprints of the server's state and of every client's in a checkpoint."""
    clients = {f"client {client}": fingerprint(found.client(client)) for client in sorted(found.clients)}
    return {"server": fingerprint(found.server())} | clients


def newest(folder: Path) -> Found | None:
    """The checkpoint that a resume of this run would use."""
    run = RunFolder(folder)
    job = load(run.job.read_text(encoding="utf-8"))
    return Checkpoints(run.checkpoints, job.checkpoint.keep, InProcess.alone(), job.resume_sha256).newest()


def states_by_round(folder: Path) -> dict[int, dict[str, str]]:
    """The states of every checkpoint that a run has kept, by round; unverified."""
    found = {}
    for path in sorted(RunFolder(folder).checkpoints.iterdir()):
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
        clients = {client: path / name for client, name in manifest.clients.items()}
        found[manifest.round] = states(Found(manifest.round, path, manifest.ranks, clients))
    return found


@dataclass(frozen=True)
class Outcome:
    """A complete run: the ranks of every round, states by name, metrics rows, ledger and summary."""

    ranks: list[int]
    states: dict[str, str]
    rows: list[dict[str, Any]]
    ledger: list[tuple[Any, ...]]
    summary: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        """Of a run folder. Raises `AssertionError` where the run is not complete, or its files contradict."""
        run = RunFolder(folder)
        summary = run.read_summary()
        assert summary is not None and summary["complete"] is True, f"{folder} is not complete"
        found = newest(folder)
        assert found is not None, f"{folder} has no checkpoint"
        rows, record = run.read_metrics(), read_record(run.record)
        assert [row["round"] for row in rows] == list(range(1, summary["rounds"] + 1)), f"{run.metrics}: rounds"
        assert list(record.metrics["accuracy"]) == [row["accuracy"] for row in rows], f"{run.record}: accuracy"
        ledger = list(zip(*(record.ledger[name].tolist() for name in record.ledger), strict=True))
        ranks = [len({rank for round_, _, _, _, rank, *_ in ledger if round_ == row["round"]}) for row in rows]
        return cls(ranks, states(found), rows, ledger, summary)

    def compared(self, with_mpi: bool) -> dict[str, Any]:
        """What is compared, by name: without times, and `with_mpi` or without what depends on the number of ranks."""
        rows = [_without_wire({name: value for name, value in row.items() if name != TIMES}) for row in self.rows]
        of_the_last_start = (TIMES, "resumed", "deaths", "ranks")
        summary = {name: value for name, value in self.summary.items() if name not in of_the_last_start}
        summary = _without_wire(summary)
        ledger: Any = sorted(self.ledger)
        if not with_mpi:
            rows = [row | {"bytes": row["bytes"]["logical"]} for row in rows]
            summary["bytes"] = summary["bytes"]["logical"]
            totals: dict[tuple[Any, ...], int] = {}
            for entry in self.ledger:
                place, logical = entry[:4], entry[5]  # (round, phase, direction, kind), without the rank
                if logical:
                    totals[place] = totals.get(place, 0) + logical
            ledger = sorted(totals.items())
        parts = {f"row of round {row['round']}": json.dumps(row, sort_keys=True) for row in rows}
        return self.states | parts | {"ledger": ledger, "summary": json.dumps(summary, sort_keys=True)}


def _without_wire(record: dict[str, Any]) -> dict[str, Any]:
    """Without what was read from counters of the network, which no two runs share."""
    return record | {"bytes": {name: value for name, value in record["bytes"].items() if name != "wire"}}


def differences(expected: Outcome, actual: Outcome, ignore: Container[str] = ()) -> list[str]:
    """Names of what differs: states, rows, ledger, summary. Empty where the two runs are equal.

    Runs of two jobs of the same meaning differ in their summary alone, which can be ignored.
    """
    with_mpi = expected.ranks == actual.ranks
    left, right = expected.compared(with_mpi), actual.compared(with_mpi)
    return [name for name in left | right if left.get(name) != right.get(name) and name not in ignore]
