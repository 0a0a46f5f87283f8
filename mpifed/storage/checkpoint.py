"""Checkpoints that are complete or invisible.

Every rank writes one file of states into `round_000042.tmp`; when all ranks say that theirs is on disk, rank 0 adds
`manifest.json`, and the rename to `round_000042` makes the checkpoint exist. A checkpoint is used only after every
file has the size and SHA-256 that its manifest states, and before libhdf5 opens any of them; else the one before it
is. `docs/checkpoints.md` describes the files and the protocol.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import h5py
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

import mpifed
from mpifed import failpoints
from mpifed.errors import BadInput, CheckpointError
from mpifed.storage import states
from mpifed.types import State

VISIBLE_WITHIN_S = 10.0
"""Seconds that a folder made by rank 0 may take to appear on another node."""
MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"

_FINAL = re.compile(r"round_([0-9]{6,})(?:\.([0-9]{1,9}))?")
_PARTIAL = re.compile(_FINAL.pattern + r"\.tmp")
_MANIFEST_BYTES = 1 << 28  # far more than a million clients need
_KIND = "checkpoint"
_log = logging.getLogger("mpifed")


class Communicator(Protocol):
    """What a checkpoint needs of `mpifed.comm`; the root is rank 0."""

    rank: int
    size: int

    def broadcast_bytes(self, data: bytes | None, kind: str) -> bytes: ...

    def gather_bytes(self, data: bytes, kind: str) -> list[bytes] | None: ...


_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_FileName = Annotated[str, Field(pattern=r"^rank_[0-9]{4,}\.h5$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class FileEntry(_Strict):
    """One rank's file: its size in bytes and its hash."""

    size: NonNegativeInt
    sha256: _Sha256


class Manifest(_Strict):
    """`manifest.json`: what a checkpoint consists of. A file that it does not name is never opened."""

    schema_version: Literal[1] = 1
    job_sha256: str
    round: NonNegativeInt
    ranks: PositiveInt
    files: dict[_FileName, FileEntry]
    clients: dict[NonNegativeInt, _FileName]
    """Which file holds a client's state, by client id."""
    versions: dict[str, str]
    created: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint: the state after `round`, written by `ranks` ranks."""

    round: int
    path: Path
    ranks: int
    clients: Mapping[int, Path] = field(repr=False)
    """The file that holds a client's state, by client id."""

    def server(self) -> State:
        """The server's state. Raises `CheckpointError` where it cannot be read, as the other readers do."""
        return states.read_state(self.path / _file_name(0), "server")

    def client(self, client: int) -> State:
        """A client's state, from the one file that holds it."""
        if client not in self.clients:
            raise CheckpointError(f"{self.path} holds no state of client {client}; use another checkpoint")
        return states.read_state(self.clients[client], f"clients/{client}")

    def records(self, name: str) -> bytes:
        """A record (`metrics`, `ledger`) as it was saved."""
        return states.read_record(self.path / _file_name(0), name)


class Checkpoints:
    """The checkpoints of one run, in one folder that every rank sees. `save` and `newest` are collective.

    `skipped` holds one sentence for every checkpoint that the last `newest` passed over, newest first.
    """

    def __init__(self, folder: Path, keep: int, comm: Communicator, job_sha256: str) -> None:
        if keep < 2:
            raise BadInput(
                f"checkpoint.keep: {keep} is too few; keep at least 2, so that a damaged one has a predecessor"
            )
        self.folder = folder
        self.keep = keep
        self.comm = comm
        self.job_sha256 = job_sha256
        self.skipped: list[str] = []
        self._damaged: set[Path] = set()

    # --- saving -------------------------------------------------------------------------------------------------------
    def save(
        self,
        round_: int,
        server: State | None,
        clients: Iterable[tuple[int, State]],
        records: Mapping[str, bytes],
    ) -> Path:
        """Write the state after `round_`; on return it is on disk, complete, under the path that every rank is given.

        Rank 0 gives the server's state and the records, every rank the clients that live on it, which are consumed one
        at a time. Raises the same `CheckpointError` on every rank where one of them cannot write; then nothing
        has changed: earlier checkpoints are as they were.
        """
        rank = self.comm.rank
        failpoints.reach("checkpoint.before", round_, rank)
        partial = self.folder / f"round_{round_:06d}.tmp"
        self._on_root(lambda: self._make(partial))
        report = self._write(round_, partial, server, clients, records)
        manifest = self._agree(round_, partial, report)
        failpoints.reach("checkpoint.agreed", round_, rank)
        final = self.folder / self._on_root(lambda: self._publish(round_, partial, manifest))
        if rank != 0:
            failpoints.reach("checkpoint.manifest_written", round_, rank)
            failpoints.reach("checkpoint.renamed", round_, rank)
        else:
            self._prune(final)
        failpoints.reach("checkpoint.pruned", round_, rank)
        return final

    def _on_root(self, act: Any) -> Any:
        """What `act` returns at rank 0 (JSON), on every rank; or its error, on every rank."""
        answer = b""
        if self.comm.rank == 0:
            try:
                answer = json.dumps({"value": act()}).encode()
            except (CheckpointError, BadInput) as error:
                answer = json.dumps({type(error).__name__: str(error)}).encode()
        said = json.loads(self.comm.broadcast_bytes(answer, _KIND))
        if "value" not in said:
            ((kind, sentence),) = said.items()
            raise (BadInput if kind == "BadInput" else CheckpointError)(sentence)
        return said["value"]

    def _make(self, partial: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stray in self.folder.iterdir():
                if _PARTIAL.fullmatch(stray.name):  # left by a run that was killed as it saved or deleted
                    _remove(stray)
            partial.mkdir()
        except OSError as error:
            raise CheckpointError(
                f"{partial} cannot be made ({error.strerror}); make {self.folder} a folder that can be written"
            ) from error

    def _write(
        self,
        round_: int,
        partial: Path,
        server: State | None,
        clients: Iterable[tuple[int, State]],
        records: Mapping[str, bytes],
    ) -> dict[str, Any]:
        """This rank's file; what is reported about it: size, hash and client ids, or the error."""
        rank = self.comm.rank
        saved: list[int] = []

        def groups() -> Iterator[tuple[str, State]]:
            if server is not None:
                yield "server", server
            for client, state in clients:
                saved.append(client)
                yield f"clients/{client}", state

        try:
            _wait_for(partial)
            failpoints.reach("checkpoint.file_open", round_, rank)
            size, digest = states.write_states(partial / _file_name(rank), groups(), records)
            failpoints.reach("checkpoint.file_written", round_, rank)
        except CheckpointError as error:
            return {"error": f"rank {rank}: {error}"}
        return {"size": size, "sha256": digest, "clients": saved}

    def _agree(self, round_: int, partial: Path, report: dict[str, Any]) -> Manifest | None:
        """The manifest at rank 0, if all ranks have written their file."""
        gathered = self.comm.gather_bytes(json.dumps(report).encode(), _KIND)
        reports = [json.loads(said) for said in gathered or ()]

        def decide() -> None:
            errors = [said["error"] for said in reports if "error" in said]
            if errors:
                with suppress(OSError):
                    _remove(partial)
                others = f" (and {len(errors) - 1} more ranks)" if len(errors) > 1 else ""
                raise CheckpointError(f"the checkpoint of round {round_} was not saved: {errors[0]}{others}")

        self._on_root(decide)
        if self.comm.rank != 0:
            return None
        return Manifest(
            job_sha256=self.job_sha256,
            round=round_,
            ranks=self.comm.size,
            files={
                _file_name(rank): FileEntry(size=said["size"], sha256=said["sha256"])
                for rank, said in enumerate(reports)
            },
            clients={client: _file_name(rank) for rank, said in enumerate(reports) for client in said["clients"]},
            versions={
                "mpifed": mpifed.__version__,
                "torch": torch.__version__,
                "h5py": h5py.__version__,
                "mpi4py": version("mpi4py"),
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _publish(self, round_: int, partial: Path, manifest: Manifest | None) -> str:
        """Write the manifest and give the folder its final name, which is returned."""
        assert manifest is not None
        try:
            text = manifest.model_dump_json(indent=1).encode()
            _write_durably(partial / MANIFEST, text)
            _write_durably(partial / CHECKSUM, _checksum_line(text))
            _sync_folder(partial)
            failpoints.reach("checkpoint.manifest_written", round_, 0)
            taken = [suffix for _, suffix, path in self._listed() if path.name.split(".")[0] == partial.stem]
            final = self.folder / (f"{partial.stem}.{max(taken) + 1}" if taken else partial.stem)
            partial.rename(final)
            _sync_folder(self.folder)
        except OSError as error:
            with suppress(OSError):
                _remove(partial)
            raise CheckpointError(
                f"the checkpoint of round {round_} was not saved: {error.filename or partial} cannot be written "
                f"({error.strerror}); free space there or choose another folder"
            ) from error
        failpoints.reach("checkpoint.renamed", round_, 0)
        return final.name

    def _prune(self, newest: Path) -> None:
        """Delete what is older than the `keep` newest checkpoints up to `newest`; damaged ones do not count."""
        kept = 0
        try:
            paths = [path for _, _, path in self._listed()]
            for path in paths[paths.index(newest) :]:
                if kept == self.keep:
                    doomed = path.rename(path.with_name(path.name + ".tmp"))  # half deleted, it must not be found
                    _remove(doomed)
                elif path not in self._damaged:
                    kept += 1
        except OSError as error:
            _log.warning("%s: an old checkpoint cannot be deleted (%s)", error.filename, error.strerror)

    # --- finding ------------------------------------------------------------------------------------------------------
    def newest(self) -> Found | None:
        """The newest checkpoint whose files are all as they were written, or None; the same on every rank.

        A damaged one is passed over, with one warning and one sentence in `skipped`. Raises `BadInput` on every rank
        where a checkpoint belongs to another job, and `CheckpointError` where the folder cannot be listed.
        """
        choice = self._on_root(self._choose)
        self.skipped = choice["skipped"]
        if choice["name"] is None:
            return None
        manifest = Manifest.model_validate_json(choice["manifest"])
        path = self.folder / choice["name"]
        clients = {client: path / name for client, name in manifest.clients.items()}
        return Found(manifest.round, path, manifest.ranks, clients)

    def _choose(self) -> dict[str, Any]:
        skipped: list[str] = []
        try:
            listed = self._listed()
        except FileNotFoundError:
            listed = []
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be listed ({error.strerror}); make it readable") from error
        for round_, _, path in listed:
            try:
                text = self._verify(round_, path)
            except (_Damaged, OSError) as why:
                reason = f"{why.filename}: {why.strerror}" if isinstance(why, OSError) else why
                skipped.append(f"checkpoint {path} is damaged ({reason}) and is not used")
                if path not in self._damaged:
                    self._damaged.add(path)
                    _log.warning(skipped[-1])
            else:
                return {"name": path.name, "manifest": text.decode(), "skipped": skipped}
        return {"name": None, "skipped": skipped}

    def _listed(self) -> list[tuple[int, int, Path]]:
        """(round, suffix, path) of everything that has a final name, newest first."""
        matches = [(_FINAL.fullmatch(name), name) for name in os.listdir(self.folder)]
        found = [(int(match[1]), int(match[2] or 0), self.folder / name) for match, name in matches if match]
        return sorted(found, reverse=True)

    def _verify(self, round_: int, path: Path) -> bytes:
        """The manifest's text, if this checkpoint is whole and of this job. Nothing is parsed that is not verified."""
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise _Damaged("it is not a folder")
        with _open_plain(path / MANIFEST) as file:
            text = file.read(_MANIFEST_BYTES + 1)
        with _open_plain(path / CHECKSUM) as file:
            if len(text) > _MANIFEST_BYTES or file.read(len(_checksum_line(b"")) + 1) != _checksum_line(text):
                raise _Damaged(f"{MANIFEST} is not what {CHECKSUM} says")
        try:
            manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])[:80]
            raise _Damaged(f"{MANIFEST} at {place!r}: {first['msg']}") from error
        if manifest.job_sha256 != self.job_sha256:
            raise BadInput(
                f"{path}: this checkpoint belongs to another job (hash {manifest.job_sha256[:12]}, this job's is "
                f"{self.job_sha256[:12]}); resume with the job it was written by, or choose another run folder"
            )
        if manifest.round != round_:
            raise _Damaged(f"{MANIFEST} is of round {manifest.round}")
        names = manifest.files.keys()
        if len(names) != manifest.ranks or any(_file_name(rank) not in names for rank in range(manifest.ranks)):
            raise _Damaged(f"{MANIFEST} does not name one file for each of {manifest.ranks} ranks")
        if not names >= set(manifest.clients.values()):
            raise _Damaged(f"{MANIFEST} places a client in a file that it does not name")
        for name, entry in manifest.files.items():  # sizes first: they cost nothing
            size = os.lstat(path / name).st_size
            if size != entry.size:
                raise _Damaged(f"{name} has {size} bytes, not {entry.size}")
        for name, entry in manifest.files.items():
            with _open_plain(path / name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    raise _Damaged(f"{name} is not what was written: its SHA-256 differs")
        return text


class _Damaged(Exception):
    """Why a checkpoint is not used."""


# --- files ------------------------------------------------------------------------------------------------------------
def _file_name(rank: int) -> str:
    return f"rank_{rank:04d}.h5"


def _checksum_line(text: bytes) -> bytes:
    """One line as `sha256sum` writes and checks it."""
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()


@contextmanager
def _open_plain(path: Path) -> Iterator[io.BufferedReader]:
    """A regular file, open for reading bytes; a link is not followed, and nothing that could block is opened."""
    with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _Damaged(f"{path.name} is not a regular file")
        yield file


def _write_durably(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that keeps names safe by itself
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _wait_for(folder: Path) -> None:
    """Until this node sees the folder that rank 0 has made."""
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{folder} is not visible after {VISIBLE_WITHIN_S:.0f} s; put the run folder on a file system that "
                "all nodes share"
            )
        with suppress(OSError):
            os.listdir(folder.parent)  # makes a network file system look again
        time.sleep(0.05)
