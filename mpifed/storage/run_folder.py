"""The folder that a run leaves behind: `job.toml`, `metrics.jsonl`, `summary.json`, `run.h5`, checkpoints, scratch.

Only rank 0 writes here, apart from the checkpoints. `docs/results-format.md` describes every file. Nothing in this
module imports torch or MPI, so that a report starts fast.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from mpifed.errors import BadInput

_DRAFT = "job.toml.tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; afterwards it is on disk and takes the place of `path`, or nothing changed."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text of numbers, strings, lists and mappings; a number that is not finite becomes `null`."""
    return json.dumps(_plain(value), allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class RunFolder:
    """The files of one run by name; `create` and `open` check, the constructor does not.

    A run is complete when `summary.json` says `"complete": true`, and only then.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, path: str | Path, job_toml: str) -> RunFolder:
        """A new run folder that holds `job.toml`; every folder made on the way is removed again on failure.

        Raises `BadInput` naming `out` where the folder exists and is not empty, or cannot be made.
        """
        path = Path(path)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        draft = path / _DRAFT
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise BadInput(f"out: {path} exists and is not empty; choose another folder, or continue with --resume")
            try:
                with draft.open("x", encoding="utf-8") as file:  # exclusive: of two runs at once, one is refused
                    file.write(job_toml)
                _sync(draft)
                draft.rename(path / "job.toml")
            except FileExistsError:
                raise BadInput(f"out: another run is starting in {path}; choose another folder") from None
            except OSError:
                draft.unlink(missing_ok=True)
                raise
            _sync(path)
        except (OSError, BadInput) as error:
            for folder in made:
                with suppress(OSError):  # not made yet, or somebody else's files are in it
                    folder.rmdir()
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"out: cannot make {path} ({error.strerror}); choose a folder that can be written") from None
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder; raises `BadInput` naming the path where it holds no `job.toml`."""
        folder = cls(path)
        if not folder.job.is_file():
            raise BadInput(f"{folder.path} is not a run folder (it holds no job.toml); give the folder of a run")
        return folder

    @property
    def job(self) -> Path:
        """The job as it was validated, with all defaults and overrides."""
        return self.path / "job.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a round."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The totals of a complete run."""
        return self.path / "summary.json"

    @property
    def prediction(self) -> Path:
        """What `mpifed predict --save` foretold of the run."""
        return self.path / "prediction.json"

    @property
    def record(self) -> Path:
        """Ledger, partition, provenance and rank times in HDF5 (`mpifed.storage.record`)."""
        return self.path / "run.h5"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def scratch(self) -> Path:
        """The folder of files that may be deleted once the run has ended."""
        return self.path / "scratch"

    def occupy(self) -> None:
        """Keep the folder for this process, until that ends, and drop what an earlier one left in `scratch`.

        Raises `BadInput` where another process has it. On a file system without locks, two are not kept apart.
        """
        if self._lock is not None:
            return
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{self.path}: another run is going on in this folder; wait for its end") from None
        except OSError:
            return
        shutil.rmtree(self.scratch, ignore_errors=True)

    @property
    def occupied(self) -> bool:
        """Whether a process has the folder; on a file system without locks, nobody knows of one."""
        try:
            with (self.path / ".lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def discard_draft(self) -> None:
        """Where a run died as it made the folder: take away what would keep another from making it."""
        (self.path / _DRAFT).unlink(missing_ok=True)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one round's row to `metrics.jsonl`; it has left this process on return (flush, without fsync)."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(to_json(row) + "\n")

    def truncate_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make `metrics.jsonl` hold exactly these rows: those of the checkpoint that a run resumes from.

        A summary from before is removed first, for the run is not complete any more.
        """
        self.summary.unlink(missing_ok=True)
        with replacing(self.metrics) as draft:
            draft.write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, without a last line that a killed run left torn; `[]` where there is no file.

        Raises `BadInput` naming file and line where another line cannot be read.
        """
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes().split(b"\n")
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            row = _parse_object(line)
            if row is not None and isinstance(row.get("round"), int) and isinstance(row.get("absent", []), list):
                rows.append(row)
            elif number < len(lines):  # what follows the last newline may be torn
                raise BadInput(
                    f"{self.metrics}, line {number}: not a round's row; delete the line, or run again in a new folder"
                )
        return rows

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, whole or not at all."""
        _write_object(self.summary, summary)

    def read_summary(self) -> dict[str, Any] | None:
        """What `summary.json` holds, or None where there is none; raises `BadInput` where it cannot be read."""
        return _read_object(self.summary, "delete it and resume the run")

    def write_prediction(self, prediction: Mapping[str, Any]) -> None:
        """Write `prediction.json`, whole or not at all."""
        _write_object(self.prediction, prediction)

    def read_prediction(self) -> dict[str, Any] | None:
        """What was predicted of this run, or None where nothing was; raises `BadInput` where it cannot be read."""
        return _read_object(self.prediction, "delete it, or predict again")

    @property
    def complete(self) -> bool:
        """Whether the summary says so; a summary that cannot be read does not."""
        try:
            summary = self.read_summary()
        except BadInput:
            return False
        return summary is not None and summary.get("complete") is True


def _write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")


def _read_object(path: Path, advice: str) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is none. Raises `BadInput`, with the advice, for another."""
    if not path.exists():
        return None
    value = _parse_object(path.read_bytes())
    if value is None:
        raise BadInput(f"{path}: not a JSON object; {advice}")
    return value


def _parse_object(text: bytes) -> dict[str, Any] | None:
    """A JSON object without NaN and Infinity, or None."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):  # ValueError covers undecodable bytes too
        return None
    return value if isinstance(value, dict) else None
