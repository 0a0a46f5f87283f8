"""Run folder, summary, record and export: whole files or none, nothing followed, totals worked out by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open

from mpifed.__main__ import main as mpifed_main
from mpifed.comm.ledger import Entry, Flow, Ledger, WireEntry, WireLedger
from mpifed.errors import BAD_INPUT, BadInput
from mpifed.export import save_model
from mpifed.storage.record import PartitionRecord, read_record, software_versions, write_record
from mpifed.storage.run_folder import RunFolder, replacing, to_json
from mpifed.storage.summary import summarise

ROWS: list[dict[str, Any]] = [
    {
        "round": 1,
        "accuracy": None,
        "train_loss": 2.0,
        "absent": [],
        "bytes": {
            "logical": {"up": 10, "down": 30},
            "mpi": {"sent": 20, "received": 25},
            "wire": {"source": "not measured", "sent": None, "received": None, "retransmitted": None},
        },
        "seconds": {"total": 1.5, "train": 1.0, "communicate": 0.25, "evaluate": 0.0, "server": 0.1, "checkpoint": 0.0},
    },
    {
        "round": 2,
        "accuracy": 0.75,
        "train_loss": 1.0,
        "absent": [{"client": 4, "reason": "non-finite update"}],
        "bytes": {
            "logical": {"up": 11, "down": 30},
            "mpi": {"sent": 21, "received": 26},
            "wire": {"source": "tcp_info", "sent": 70, "received": 60, "retransmitted": 9},
        },
        "seconds": {"total": 2.5, "train": 2.0, "communicate": 0.25, "evaluate": 0.5, "server": 0.1, "checkpoint": 1.0},
    },
]
LEDGER = Ledger(
    [
        Entry(1, "train", "down", "model", 0, 30, 20, 0),
        Entry(1, "train", "up", "update", 1, 10, 10, 0),
        Entry(2, "train", "up", "update", 1, 11, 11, 0),
    ]
)
WIRE = WireLedger([WireEntry(2, "train", "up", 1, 70, 0, 9)], [Flow("up", 1, 0, 70)])
PARTITION = PartitionRecord(
    train=[np.array([4, 1]), np.array([], np.int64), np.array([0])],
    histogram=np.array([[1, 1], [0, 0], [1, 0]]),
    sha256="ab" * 32,
)


def write_example(path: Path) -> None:
    provenance = software_versions() | {"ranks": 2, "hosts": ["a", "b"], "argv": ["run", "é=1"], "mpi": ""}
    times = [[1, 0, 0.5, 0.1, 0.2, 0.3, 0.4], [1, 1, 1, 0, 0, 0, 0]]
    write_record(path, ROWS, LEDGER.columns(), PARTITION, provenance, times, WIRE.columns(), WIRE.flow_columns())


# --- the folder -------------------------------------------------------------------------------------------------------
def test_create_makes_the_folder_and_open_finds_it(tmp_path: Path) -> None:
    created = RunFolder.create(tmp_path / "a" / "run", "seed = 1\n")
    assert created.job.read_text() == "seed = 1\n"
    assert sorted(os.listdir(created.path)) == ["job.toml"]
    assert RunFolder.open(created.path).path == created.path
    assert not created.complete and created.read_summary() is None and created.read_metrics() == []


def test_create_uses_an_empty_folder(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, "x").job.exists()


@pytest.mark.parametrize("name", ["job.toml", "other", "job.toml.tmp"])
def test_create_refuses_a_folder_in_use_and_leaves_it_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(BadInput, match=r"^out: .*not empty"):
        RunFolder.create(tmp_path, "x")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"


def test_create_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(BadInput, match=r"^out: .*No space left"):
        RunFolder.create(tmp_path / "a" / "b" / "run", "x")
    assert os.listdir(tmp_path) == []


def test_create_below_a_file_names_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"^out: "):
        RunFolder.create(tmp_path / "file" / "run", "x")


def test_open_refuses_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=str(tmp_path)):
        RunFolder.open(tmp_path)


# --- metrics and summary ----------------------------------------------------------------------------------------------
def test_metrics_come_back_and_can_be_cut(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "x")
    for row in ROWS:
        folder.append_metrics(row)
    assert folder.read_metrics() == ROWS
    folder.truncate_metrics(ROWS[:1])
    assert folder.read_metrics() == ROWS[:1]
    folder.append_metrics(ROWS[1])
    assert folder.read_metrics() == ROWS
    assert sorted(os.listdir(folder.path)) == ["job.toml", "metrics.jsonl"]


@pytest.mark.parametrize("torn", ["", "{", '{"round": 3, "accur', '{"round": 3', "\0\0\0"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: str) -> None:
    folder = RunFolder.create(tmp_path / "run", "x")
    folder.append_metrics({"round": 1})
    with folder.metrics.open("a") as file:
        file.write(torn)
    assert folder.read_metrics() == [{"round": 1}]


@pytest.mark.parametrize("bad", [b"garbage", b"[1]", b'{"accuracy": 1}', b'{"round": NaN}', b"\xff", b"[" * 100_000])
def test_a_bad_line_elsewhere_is_an_error_with_its_number(tmp_path: Path, bad: bytes) -> None:
    folder = RunFolder.create(tmp_path / "run", "x")
    folder.metrics.write_bytes(b'{"round": 1}\n' + bad + b'\n{"round": 3}\n')
    with pytest.raises(BadInput, match=r"metrics\.jsonl, line 2"):
        folder.read_metrics()


def test_json_has_no_nan() -> None:
    value = {"a": float("nan"), "b": [np.float32("inf"), np.int64(3), (1.5, None)], 4: np.array([1.0, np.nan])}
    assert json.loads(to_json(value)) == {"a": None, "b": [None, 3, [1.5, None]], "4": [1.0, None]}


def test_the_summary_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "x")
    folder.write_summary({"complete": False, "rounds": 1})
    assert not folder.complete
    with pytest.raises(TypeError):
        folder.write_summary({"complete": True, "rounds": object()})
    assert folder.read_summary() == {"complete": False, "rounds": 1}
    assert sorted(os.listdir(folder.path)) == ["job.toml", "summary.json"]
    folder.write_summary({"complete": True})
    assert folder.complete


def test_a_run_that_goes_on_is_not_complete_any_more(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "x")
    folder.write_summary({"complete": True})
    folder.truncate_metrics(ROWS)
    assert not folder.complete and not folder.summary.exists()


def test_a_garbage_summary_does_not_make_a_run_complete(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "x")
    folder.summary.write_bytes(b"\x89garbage")
    assert not folder.complete
    with pytest.raises(BadInput, match=r"summary\.json"):
        folder.read_summary()


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "file") as draft:
        draft.write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def _summary(rows: list[dict]) -> dict:
    return summarise(
        algorithm="fedavg",
        model="mlp",
        data="digits",
        partition_sha256="p",
        clients=3,
        ranks=2,
        seed=0,
        job_sha256="j",
        parameters=7,
        metrics_rows=rows,
        bytes_by_kind=LEDGER.by_kind(),
        resumed=1,
    )


def test_summary_by_hand() -> None:
    """up 10 + 11, down 30 + 30, sent 20 + 21, received 25 + 26; 1.5 s + 2.5 s; one evaluation, so all three are it."""
    assert _summary(ROWS) == {
        "complete": True,
        "algorithm": "fedavg",
        "model": "mlp",
        "data": {"name": "digits", "partition_sha256": "p"},
        "clients": 3,
        "ranks": 2,
        "seed": 0,
        "parameters": 7,
        "rounds": 2,
        "accuracy": {"final": 0.75, "best": 0.75, "last10": 0.75},
        "bytes": {
            "logical": {"up": 21, "down": 60, "by_kind": {"down.model": 30, "up.update": 21}},
            "mpi": {"sent": 41, "received": 51},
            "wire": {"source": "tcp_info", "sent": 70, "received": 60, "retransmitted": 9, "rounds": 1},
        },
        "seconds": {
            "total": 4.0,
            "train": 3.0,
            "communicate": 0.5,
            "evaluate": 0.5,
            "server": 0.2,
            "checkpoint": 1.0,
        },
        "absent": [{"round": 2, "client": 4, "reason": "non-finite update"}],
        "resumed": 1,
        "deaths": [],
        "job_sha256": "j",
    }


def test_last10_is_over_evaluations_not_rounds() -> None:
    """Rounds 1..24, the even ones evaluated with accuracy round/32: the last ten are 6, 8, ..., 24 (mean 15), so
    15/32; the best is put at round 10 (30/32), which then adds 20/32/10: 17/32."""
    rows = [{"round": t, "accuracy": t / 32 if t % 2 == 0 else None} for t in range(1, 25)]
    assert _summary(rows)["accuracy"] == {"final": 24 / 32, "best": 24 / 32, "last10": 15 / 32}
    rows[9]["accuracy"] = 30 / 32
    assert _summary(rows)["accuracy"] == {"final": 24 / 32, "best": 30 / 32, "last10": 17 / 32}
    assert _summary([])["accuracy"] == {"final": None, "best": None, "last10": None}


# --- run.h5 -----------------------------------------------------------------------------------------------------------
def test_a_record_comes_back(tmp_path: Path) -> None:
    write_example(tmp_path / "run.h5")
    record = read_record(tmp_path / "run.h5")
    np.testing.assert_array_equal(record.metrics["accuracy"], [np.nan, 0.75])
    np.testing.assert_array_equal(record.metrics["bytes.logical.up"], [10, 11])
    assert record.metrics["absent"] == [[], [{"client": 4, "reason": "non-finite update"}]]
    assert {name: list(column) for name, column in record.ledger.items()} == LEDGER.columns()
    assert {name: list(column) for name, column in record.wire.items()} == WIRE.columns()
    assert {name: list(column) for name, column in record.wire_flows.items()} == WIRE.flow_columns()
    assert record.metrics["bytes.wire.source"] == ["not measured", "tcp_info"]
    np.testing.assert_array_equal(record.metrics["bytes.wire.sent"], [np.nan, 70])
    assert record.partition is not None and record.partition.test is None
    for indices, expected in zip(record.partition.train, PARTITION.train, strict=True):
        np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(record.partition.histogram, PARTITION.histogram)
    assert record.partition.sha256 == PARTITION.sha256
    assert record.provenance["hosts"] == ["a", "b"] and record.provenance["argv"] == ["run", "é=1"]
    assert record.provenance["ranks"] == 2 and record.provenance["mpi"] == ""
    assert record.provenance["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record.rank_times["rank"].tolist() == [0, 1] and record.rank_times["evaluate"].tolist() == [0.3, 0.0]
    assert os.listdir(tmp_path) == ["run.h5"]


def test_a_record_of_nothing_comes_back(tmp_path: Path) -> None:
    write_record(tmp_path / "run.h5", [], Ledger().columns(), None, {}, [])
    record = read_record(tmp_path / "run.h5")
    assert record.metrics == {} and record.partition is None and len(record.ledger["kind"]) == 0
    assert len(record.wire["rank"]) == len(record.wire_flows["sender"]) == 0


def test_a_record_of_before_there_were_wire_bytes(tmp_path: Path) -> None:
    write_example(tmp_path / "run.h5")
    with h5py.File(tmp_path / "run.h5", "a") as file:
        del file["wire"], file["wire_flows"]
    assert read_record(tmp_path / "run.h5").wire == {}


def test_columns_are_plain_types(tmp_path: Path) -> None:
    write_example(tmp_path / "run.h5")
    with h5py.File(tmp_path / "run.h5") as file:
        found = []
        file.visititems(lambda name, item: found.append(item.dtype.kind) if isinstance(item, h5py.Dataset) else None)
        assert set(found) <= set("iufS")
        assert file["ledger/round"].dtype == np.int32 and file["ledger/logical"].dtype == np.int64
        assert file["ledger/kind"].dtype == "S6" and file["metrics/absent"].dtype == np.uint8
        assert file["partition/train_sizes"][()].tolist() == [2, 0, 1]


def test_a_failed_record_leaves_the_old_one(tmp_path: Path) -> None:
    write_example(tmp_path / "run.h5")
    before = (tmp_path / "run.h5").read_bytes()
    with pytest.raises(KeyError):
        write_record(tmp_path / "run.h5", ROWS, {}, None, {}, [])
    assert os.listdir(tmp_path) == ["run.h5"] and (tmp_path / "run.h5").read_bytes() == before


def _external(file: h5py.File, other: Path) -> None:
    del file["ledger"]
    file["ledger"] = h5py.ExternalLink(other, "/ledger")


def _soft(file: h5py.File, other: Path) -> None:
    del file["ledger/rank"]
    file["ledger/rank"] = h5py.SoftLink("/ledger/round")


def _external_storage(file: h5py.File, other: Path) -> None:
    del file["ledger/rank"]
    file["ledger"].create_dataset("rank", (3,), "int32", external=[(str(other), 0, 12)])


def _virtual(file: h5py.File, other: Path) -> None:
    del file["ledger/rank"]
    layout = h5py.VirtualLayout((3,), "int32")
    layout[:] = h5py.VirtualSource(other, "/ledger/rank", (3,))
    file["ledger"].create_virtual_dataset("rank", layout)


def _object_type(file: h5py.File, other: Path) -> None:
    del file["ledger/kind"]
    file["ledger/kind"] = ["a", "b", "c"]


def _huge(file: h5py.File, other: Path) -> None:
    file["metrics"].create_dataset("huge", (2**50,), "float64")


def _huge_chunked(file: h5py.File, other: Path) -> None:
    file["metrics"].create_dataset("huge", (2**40,), "float64", chunks=(2**10,))


def _attribute(file: h5py.File, other: Path) -> None:
    file["provenance"].attrs["seed"] = "a variable-length string"


def _loop(file: h5py.File, other: Path) -> None:
    file["metrics/loop"] = file["/"]


@pytest.mark.parametrize(
    "spoil",
    [_external, _soft, _external_storage, _virtual, _object_type, _huge, _huge_chunked, _attribute, _loop],
)
def test_a_record_with_what_is_never_written_is_refused(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    write_example(tmp_path / "run.h5")
    write_example(tmp_path / "other.h5")
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        spoil(file, tmp_path / "other.h5")
    with pytest.raises(BadInput, match=r"run\.h5: (/|attribute)"):
        read_record(tmp_path / "run.h5")


def test_an_external_link_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link's target is a pipe that nobody writes to: opening it would block for ever."""
    write_example(tmp_path / "run.h5")
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        _external(file, tmp_path / "pipe")
    with pytest.raises(BadInput, match="/ledger is a link"):
        read_record(tmp_path / "run.h5")


@pytest.mark.parametrize("keep", [0, 7, 100, 2000])
def test_a_truncated_record_is_said_to_be_damaged(tmp_path: Path, keep: int) -> None:
    write_example(tmp_path / "run.h5")
    (tmp_path / "run.h5").write_bytes((tmp_path / "run.h5").read_bytes()[:keep])
    with pytest.raises(BadInput, match=r"run\.h5: damaged"):
        read_record(tmp_path / "run.h5")


# --- export and dispatcher --------------------------------------------------------------------------------------------
def test_an_exported_model_holds_values_and_metadata(tmp_path: Path) -> None:
    """Views of one flat vector share memory, which safetensors refuses; each is written on its own."""
    flat = torch.arange(6.0)
    save_model(tmp_path / "m.safetensors", {"w": flat[:4].view(2, 2).T, "b": flat[4:]}, {"model": "mlp"})
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"model": "mlp"}
        assert file.get_tensor("w").tolist() == [[0, 2], [1, 3]] and file.get_tensor("b").tolist() == [4, 5]
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_export_to_nowhere_names_out(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^--out: "):
        save_model(tmp_path / "none" / "m.safetensors", {"w": torch.zeros(1)}, {})


def test_the_dispatcher_helps_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mpifed_main(["--help"]) == 0
    assert "report" in capsys.readouterr().out
    assert mpifed_main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mpifed ")
    assert mpifed_main(["repotr"]) == BAD_INPUT
    assert "did you mean 'report'?" in capsys.readouterr().err
    assert mpifed_main([]) == BAD_INPUT
    capsys.readouterr()
    assert mpifed_main(["report", str(tmp_path)]) == BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1
    assert mpifed_main(["export", str(tmp_path)]) == BAD_INPUT


def test_a_folder_is_occupied_by_one_run(tmp_path: Path) -> None:
    """Twice by the same one, as after the death of ranks."""
    folder = RunFolder.create(tmp_path / "run", "")
    assert not folder.occupied
    folder.occupy()
    folder.occupy()
    assert RunFolder(folder.path).occupied
    with pytest.raises(BadInput, match="another run is going on"):
        RunFolder(folder.path).occupy()


def test_what_is_left_of_a_folder_that_was_not_made_is_discarded(tmp_path: Path) -> None:
    (tmp_path / "job.toml.tmp").write_text("rou")
    RunFolder(tmp_path).discard_draft()
    assert RunFolder.create(tmp_path, "rounds = 1").job.read_text() == "rounds = 1"
