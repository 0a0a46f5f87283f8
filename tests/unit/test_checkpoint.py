"""Checkpoints: complete or invisible, verified before use, the previous one when damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpifed import failpoints
from mpifed.errors import BadInput, CheckpointError
from mpifed.storage import checkpoint
from mpifed.storage.checkpoint import Checkpoints, Found
from mpifed.types import State

ROOT = Path(__file__).parents[2]
JOB = "a" * 64


class Threads:
    """A communicator whose ranks are threads; a rank that fails ends the others' waiting."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[bytes]) -> None:
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots

    def broadcast_bytes(self, data: bytes | None, kind: str) -> bytes:
        return self._all(data or b"")[0]

    def gather_bytes(self, data: bytes, kind: str) -> list[bytes] | None:
        said = self._all(data)
        return said if self.rank == 0 else None

    def _all(self, data: bytes) -> list[bytes]:
        self._slots[self.rank] = data
        self._barrier.wait()
        said = list(self._slots)
        self._barrier.wait()
        return said


def run_ranks(size: int, main: Callable[[Threads], Any]) -> list[Any]:
    """Each rank's result, or the exception that it raised, in rank order."""
    barrier, slots = threading.Barrier(size, timeout=30), [b""] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = main(Threads(rank, size, barrier, slots))
        except Exception as error:
            results[rank] = error
            if not isinstance(error, CheckpointError | BadInput):
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def alone(folder: Path, keep: int = 2, job: str = JOB) -> Checkpoints:
    return Checkpoints(folder, keep, Threads(0, 1, threading.Barrier(1), [b""]), job)


def server_of(round_: int) -> State:
    return {"model": torch.full((20,), float(round_)), "empty": {}}


def client_of(client: int, round_: int) -> State:
    return {"c": torch.tensor([client, round_])}


def save(checkpoints: Checkpoints, round_: int) -> Path:
    """Clients are dealt by id: rank r of n holds r, r + n, ... of six."""
    rank, size = checkpoints.comm.rank, checkpoints.comm.size
    return checkpoints.save(
        round_,
        server_of(round_) if rank == 0 else None,
        ((client, client_of(client, round_)) for client in range(rank, 6, size)),
        {"metrics": b"[%d]" % round_} if rank == 0 else {},
    )


def assert_is(found: Found | None, round_: int) -> None:
    assert found is not None and found.round == round_
    assert torch.equal(found.server()["model"], server_of(round_)["model"])  # type: ignore[arg-type]
    assert list(found.server()) == ["model", "empty"]
    assert sorted(found.clients) == list(range(6))
    for client in range(6):
        assert torch.equal(found.client(client)["c"], client_of(client, round_)["c"])  # type: ignore[arg-type]
    assert found.records("metrics") == b"[%d]" % round_


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with good checkpoints of rounds 1 and 2, each by two ranks."""
    run_ranks(2, lambda comm: [save(Checkpoints(tmp_path, 2, comm, JOB), round_) for round_ in (1, 2)])
    assert names(tmp_path) == ["round_000001", "round_000002"]
    return tmp_path


def falls_back(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """The one sentence about round 2, after which round 1 is used."""
    caplog.clear()
    checkpoints = alone(folder)
    with caplog.at_level(logging.INFO, "mpifed"):
        found = checkpoints.newest()
        checkpoints.newest()  # says nothing a second time
    assert_is(found, 1)
    assert [record.getMessage() for record in caplog.records] == checkpoints.skipped
    (sentence,) = checkpoints.skipped
    assert str(folder / "round_000002") in sentence and "\n" not in sentence
    return sentence


# --- saving ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_saved_is_found_on_every_rank(tmp_path: Path, ranks: int) -> None:
    def main(comm: Threads) -> tuple[Path, Found | None]:
        checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 2, comm, JOB)
        assert checkpoints.newest() is None
        return save(checkpoints, 42), checkpoints.newest()

    for path, found in run_ranks(ranks, main):
        assert path == tmp_path / "run" / "checkpoints" / "round_000042"
        assert_is(found, 42)
        assert found.ranks == ranks
    assert names(path) == ["manifest.json", "manifest.sha256"] + [f"rank_{rank:04d}.h5" for rank in range(ranks)]


def test_a_checkpoint_of_many_ranks_is_read_by_fewer_and_by_more(two: Path) -> None:
    for ranks in (1, 3):
        for found in run_ranks(ranks, lambda comm: Checkpoints(two, 2, comm, JOB).newest()):
            assert_is(found, 2)


def test_a_client_that_has_no_state_is_named(two: Path) -> None:
    found = alone(two).newest()
    assert found is not None
    with pytest.raises(CheckpointError, match="client 17"):
        found.client(17)


def test_the_manifest_says_what_sha256sum_and_ls_say(two: Path) -> None:
    path = two / "round_000002"
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["round"], manifest["ranks"], manifest["job_sha256"]) == (2, 2, JOB)
    assert set(manifest["versions"]) == {"mpifed", "torch", "h5py", "mpi4py"}
    assert manifest["clients"] == {str(client): f"rank_{client % 2:04d}.h5" for client in range(6)}
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    assert (path / "manifest.sha256").read_text() == f"{digest}  manifest.json\n"


def test_a_failing_rank_is_named_on_all_and_nothing_changes(two: Path) -> None:
    """Rank 1 meets a tensor that cannot be stored, after it has written others."""

    def main(comm: Threads) -> None:
        bad = {"c": torch.ones(1, dtype=torch.complex64)}
        clients = [(0, client_of(0, 3)), (1, bad if comm.rank == 1 else client_of(1, 3))]
        Checkpoints(two, 2, comm, JOB).save(3, server_of(3), clients, {})

    errors = run_ranks(3, main)
    assert {type(error) for error in errors} == {CheckpointError}
    assert len({str(error) for error in errors}) == 1
    for part in ("round 3", "rank 1", "rank_0001.h5", "clients/1/c", "complex64"):
        assert part in str(errors[0])
    assert names(two) == ["round_000001", "round_000002"]
    assert_is(alone(two).newest(), 2)


def test_a_folder_that_other_ranks_do_not_see_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run folder of rank 1 is on its own node's disk."""
    monkeypatch.setattr(checkpoint, "VISIBLE_WITHIN_S", 0.2)

    def main(comm: Threads) -> None:
        save(Checkpoints(tmp_path / f"node{comm.rank}", 2, comm, JOB), 1)

    for error in run_ranks(2, main):
        assert isinstance(error, CheckpointError) and "rank 1" in str(error) and "node1" in str(error)


def test_a_folder_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    def main(comm: Threads) -> Path:
        folder = tmp_path / f"node{comm.rank}"
        if comm.rank == 1:
            threading.Timer(0.2, folder.symlink_to, [tmp_path / "node0"]).start()
        return save(Checkpoints(folder, 2, comm, JOB), 1)

    assert [path.name for path in run_ranks(2, main)] == ["round_000001"] * 2


def test_a_folder_that_cannot_be_made_is_named_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for error in run_ranks(2, lambda comm: save(Checkpoints(tmp_path / "file" / "c", 2, comm, JOB), 1)):
        assert isinstance(error, CheckpointError) and str(tmp_path / "file" / "c") in str(error)
    for error in run_ranks(2, lambda comm: Checkpoints(tmp_path / "file", 2, comm, JOB).newest()):
        assert isinstance(error, CheckpointError) and str(tmp_path / "file") in str(error)


def test_a_manifest_that_cannot_be_written_is_an_error_on_all_ranks(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def main(comm: Threads) -> None:
        clients = iter([(comm.rank, client_of(comm.rank, 3))])
        Checkpoints(two, 2, comm, JOB).save(3, server_of(3), clients, {})

    write_states = checkpoint.states.write_states

    def write_then_full(*args: Any) -> tuple[int, str]:
        written = write_states(*args)
        monkeypatch.setattr(os, "fsync", full)
        return written

    monkeypatch.setattr(checkpoint.states, "write_states", write_then_full)
    results = run_ranks(1, main)
    assert isinstance(results[0], CheckpointError)
    assert "manifest.json" in str(results[0]) and "No space left" in str(results[0])
    assert names(two) == ["round_000001", "round_000002"]


DISK_FULL = """
import resource, signal, sys, torch
from pathlib import Path
from mpifed.comm.inprocess import InProcess
from mpifed.errors import CheckpointError
from mpifed.storage.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(Path(sys.argv[1]), 2, InProcess.alone(), "a" * 64)
state = {"model": torch.ones(10_000)}
checkpoints.save(1, state, [], {})
for round_, limit in enumerate((0, 10_000, 40_100), 2):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoints.save(round_, state, [], {})
    except CheckpointError as error:
        print(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(checkpoints.newest().round, checkpoints.save(9, state, [], {}).name)
"""


def test_a_full_disk_leaves_the_old_checkpoint_and_names_the_path(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DISK_FULL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    *errors, last = done.stdout.splitlines()
    assert len(errors) == 3
    for error in errors:
        assert str(tmp_path) in error and "File too large" in error
    assert last == "1 round_000009"
    assert names(tmp_path) == ["round_000001", "round_000009"]


# --- names and deletion ----------------------------------------------------------------------------------------------
def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path, keep=3)
    for round_ in (1, 2, 5, 9, 10):
        save(checkpoints, round_)
    assert names(tmp_path) == ["round_000005", "round_000009", "round_000010"]


def test_a_name_is_never_used_twice_and_a_later_one_is_newer(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path, keep=2)
    assert [save(checkpoints, 3).name for _ in range(4)] == [
        "round_000003",
        "round_000003.1",
        "round_000003.2",
        "round_000003.3",
    ]
    assert names(tmp_path) == ["round_000003.2", "round_000003.3"]
    found = checkpoints.newest()
    assert found is not None and found.path.name == "round_000003.3"


def test_suffixes_and_rounds_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(alone(tmp_path, keep=9), 999_999)
    for name in ("round_999999.2", "round_999999.10"):
        shutil.copytree(tmp_path / "round_999999", tmp_path / name)
    found = alone(tmp_path).newest()
    assert found is not None and found.path.name == "round_999999.10"
    assert save(alone(tmp_path, keep=9), 1_000_000).name == "round_1000000"
    assert_is(alone(tmp_path).newest(), 1_000_000)


def test_newer_ones_and_other_files_are_not_deleted(two: Path) -> None:
    """A run resumed from round 1 saves round 1 again: what is newer stays, and what is not a checkpoint."""
    (two / "notes.txt").touch()
    (two / "round_12").mkdir()
    save(alone(two), 1)
    assert names(two) == ["notes.txt", "round_000001", "round_000001.1", "round_000002", "round_12"]


def test_damaged_ones_do_not_count_as_kept(two: Path) -> None:
    """Round 2 is damaged: after round 3 the two that can be used are 3 and 1."""
    (two / "round_000002" / "rank_0001.h5").unlink()
    checkpoints = alone(two)
    assert_is(checkpoints.newest(), 1)
    save(checkpoints, 3)
    assert names(two) == ["round_000001", "round_000002", "round_000003"]
    save(checkpoints, 4)
    assert names(two) == ["round_000003", "round_000004"]


def test_a_failed_deletion_is_a_warning(
    two: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING, "mpifed"):
        save(alone(two), 3)
    (record,) = caplog.records
    assert "round_000001" in record.getMessage() and "not permitted" in record.getMessage()
    assert_is(alone(two).newest(), 3)


def test_keep_is_at_least_two(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"checkpoint\.keep"):
        alone(tmp_path, keep=1)


# --- finding ---------------------------------------------------------------------------------------------------------
def test_nothing_valid_is_none(two: Path) -> None:
    for round_ in (1, 2):
        (two / f"round_{round_:06d}" / "manifest.json").unlink()
    checkpoints = alone(two)
    assert checkpoints.newest() is None
    assert len(checkpoints.skipped) == 2


def test_partial_folders_are_ignored_and_cleared_away(two: Path) -> None:
    shutil.copytree(two / "round_000002", two / "round_000003.tmp")
    shutil.copytree(two / "round_000002", two / "round_000004.1.tmp")
    checkpoints = alone(two)
    assert_is(checkpoints.newest(), 2)
    assert checkpoints.skipped == []
    save(checkpoints, 3)
    assert names(two) == ["round_000002", "round_000003"]
    assert_is(checkpoints.newest(), 3)


@pytest.mark.parametrize("name", ["rank_0000.h5", "rank_0001.h5", "manifest.json", "manifest.sha256"])
@pytest.mark.parametrize("harm", ["delete", "empty", "cut in half", "cut by one", "one more", "link", "folder", "pipe"])
def test_a_harmed_file_is_detected(two: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    path = two / "round_000002" / name
    data = path.read_bytes()
    kept = {"empty": b"", "cut in half": data[: len(data) // 2], "cut by one": data[:-1], "one more": data + b"\0"}
    path.unlink()
    if harm in kept:
        path.write_bytes(kept[harm])
    elif harm == "link":
        (two / "elsewhere").write_bytes(data)
        path.symlink_to(two / "elsewhere")
    elif harm == "folder":
        path.mkdir()
    elif harm == "pipe":
        os.mkfifo(path)
    assert name in falls_back(two, caplog)


@pytest.mark.parametrize("name", ["rank_0000.h5", "rank_0001.h5", "manifest.json", "manifest.sha256"])
def test_every_flipped_bit_is_detected(two: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """One bit in every 50th byte; and put right again, the checkpoint is used: no false alarm."""
    path = two / "round_000002" / name
    data = path.read_bytes()
    for place in range(0, len(data), 50):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        falls_back(two, caplog)
    path.write_bytes(data)
    assert_is(alone(two).newest(), 2)


def test_a_checkpoint_that_is_a_link_is_not_followed(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    (two / "round_000002").rename(two / "elsewhere")
    (two / "round_000002").symlink_to(two / "elsewhere")
    falls_back(two, caplog)


def _set(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]  # type: ignore[index]
        manifest[keys[-1]] = value  # type: ignore[index]

    return change


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.pop(key)


def _moved(to: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][to] = manifest["files"].pop("rank_0001.h5")
        manifest["clients"] = {client: to for client in manifest["clients"]}

    return change


FORGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "traversal": _moved("../round_000001/rank_0001.h5"),
    "absolute": _moved("/etc/passwd"),
    "newline": _moved("rank_0001.h5\n"),
    "other name": _moved("notes.h5"),
    "short name": _moved("rank_1.h5"),
    "other digits": _moved("rank_٠٠٠١.h5"),
    "wrong rank": _moved("rank_0002.h5"),
    "client elsewhere": _set("clients", "3", value="../x.h5"),
    "client in a file that is not named": _set("clients", "3", value="rank_0007.h5"),
    "client that is no number": _set("clients", "x", value="rank_0000.h5"),
    "client below zero": _set("clients", "-1", value="rank_0000.h5"),
    "size as text": _set("files", "rank_0000.h5", "size", value="12"),
    "size true": _set("files", "rank_0000.h5", "size", value=True),
    "size infinite": _set("files", "rank_0000.h5", "size", value=float("inf")),
    "size huge": _set("files", "rank_0000.h5", "size", value=10**400),
    "size below zero": _set("files", "rank_0000.h5", "size", value=-1),
    "hash short": _set("files", "rank_0000.h5", "sha256", value="ab"),
    "hash null": _set("files", "rank_0000.h5", "sha256", value=None),
    "ranks huge": _set("ranks", value=10**18),
    "ranks one less": _set("ranks", value=1),
    "round other": _set("round", value=3),
    "round a list": _set("round", value=[2]),
    "schema newer": _set("schema_version", value=2),
    "files a list": _set("files", value=[]),
    "files missing": _without("files"),
    "clients missing": _without("clients"),
    "unknown key": _set("python", value="import os"),
}


def forge(path: Path, text: bytes) -> None:
    """A manifest by somebody who also writes its checksum."""
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED.keys())
def test_a_forged_manifest_is_refused(
    two: Path, change: Callable[[dict[str, Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = two / "round_000002"
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    forge(path, json.dumps(manifest).encode())
    falls_back(two, caplog)


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b'{"schema_version": 1}']
)
def test_a_manifest_that_is_none_is_refused(two: Path, text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    forge(two / "round_000002", text)
    falls_back(two, caplog)


def test_the_checkpoint_of_another_job_stops_every_rank(two: Path) -> None:
    for error in run_ranks(2, lambda comm: Checkpoints(two, 2, comm, "b" * 64).newest()):
        assert isinstance(error, BadInput)
        assert "belongs to another job" in str(error) and "round_000002" in str(error)


def test_damage_is_not_mistaken_for_another_job(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = two / "round_000002" / "manifest.json"
    path.write_text(path.read_text().replace(JOB, "b" + JOB[1:]))
    falls_back(two, caplog)


def test_all_ranks_are_told_what_was_passed_over_and_one_logs_it(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    (two / "round_000002" / "rank_0001.h5").unlink()

    def main(comm: Threads) -> tuple[Found | None, list[str]]:
        checkpoints = Checkpoints(two, 2, comm, JOB)
        return checkpoints.newest(), checkpoints.skipped

    with caplog.at_level(logging.WARNING, "mpifed"):
        results = run_ranks(3, main)
    for found, skipped in results:
        assert_is(found, 1)
        assert skipped == [caplog.records[0].getMessage()]
    assert len(caplog.records) == 1


# --- dying in the middle ---------------------------------------------------------------------------------------------
STEPS = [name for name in failpoints.NAMES if name.startswith("checkpoint.")]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", STEPS)
def test_stopped_at_any_step_the_old_or_the_new_checkpoint_is_whole(
    two: Path, monkeypatch: pytest.MonkeyPatch, step: str, rank: int
) -> None:
    """A rank that stops at a step ends the run there; round 2 is found, or round 3 once that is renamed.

    Rank 1's last three steps come after the rename; as it stops at `agreed`, rank 0 may or may not get that far.
    """
    monkeypatch.setattr(failpoints, "_ARMED", {(step, 3, rank): "raise"})
    results = run_ranks(2, lambda comm: save(Checkpoints(two, 2, comm, JOB), 3))
    assert isinstance(results[rank], RuntimeError)
    monkeypatch.undo()
    renamed = (two / "round_000003").exists()
    if (step, rank) != ("checkpoint.agreed", 1):
        first_after = "checkpoint.renamed" if rank == 0 else "checkpoint.manifest_written"
        assert renamed == (STEPS.index(step) >= STEPS.index(first_after))
    checkpoints = alone(two)
    assert_is(checkpoints.newest(), 3 if renamed else 2)
    assert checkpoints.skipped == []
    save(checkpoints, 4)
    assert_is(checkpoints.newest(), 4)
    assert not [name for name in names(two) if name.endswith(".tmp")]


def test_deletion_stopped_in_the_middle_leaves_nothing_that_is_found(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path) -> Iterator[None]:
        (path / "rank_0000.h5").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        save(alone(two), 3)
    monkeypatch.undo()
    assert names(two) == ["round_000001.tmp", "round_000002", "round_000003"]
    checkpoints = alone(two)
    assert_is(checkpoints.newest(), 3)
    assert checkpoints.skipped == []
