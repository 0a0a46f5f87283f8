"""Logical, MPI and wire bytes beside each other: numbers by hand, and only sentences that the record shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpifed.comm.ledger import Entry, Flow, Ledger, WireEntry, WireLedger
from mpifed.report.command import main
from mpifed.report.layout import as_text
from mpifed.report.runs import Run, read_run
from mpifed.report.traffic import Bytes, bytes_of, flow_matrix, messages, traffic_table
from mpifed.storage.record import PartitionRecord, Record, read_record, write_record
from mpifed.storage.run_folder import RunFolder
from mpifed.storage.summary import summarise

MB = 10**6


def make_run(folder: Path, source: str = "tcp_info", hosts: tuple[str, ...] = ("a", "b", "c")) -> Run:
    """Three ranks, ten clients, one round with wire bytes and one, before it, without.

    A model of 1 MB: ten downloads, broadcast 0 -> 1 -> 2 with 100 bytes of headers each, 50 bytes sent again; upwards a
    vector of 2 MB of each rank, of which rank 1 sends half to rank 2 first.
    """
    entries = [
        entry
        for round_ in (1, 2)
        for entry in (
            Entry(round_, "train", "down", "model", 0, 4 * MB, MB, 0),
            Entry(round_, "train", "down", "model", 1, 3 * MB, 0, MB),
            Entry(round_, "train", "down", "model", 2, 3 * MB, 0, MB),
            Entry(round_, "train", "up", "update", 0, 4 * MB, 2 * MB, 2 * MB),
            Entry(round_, "train", "up", "update", 1, 3 * MB, 2 * MB, 0),
            Entry(round_, "train", "up", "update", 2, 3 * MB, 2 * MB, 0),
        )
    ]
    wire = WireLedger()
    if source != "not measured":
        down = [(MB + 150, 0, 50), (MB + 100, MB + 100, 0), (0, MB + 100, 0)]
        wire.add(2, "train", "down", down, {(0, 1): MB + 150, (1, 2): MB + 100})
        up = {(1, 2): MB, (1, 0): MB, (2, 0): 2 * MB}
        wire.add(2, "train", "up", [(0, 3 * MB, 0), (2 * MB, 0, 0), (2 * MB, MB, 0)], up)
    if source == "interface":
        wire = WireLedger(wire.entries)  # which knows no pairs
    measured = source != "not measured"
    totals = wire.totals(2) if measured else dict.fromkeys(("sent", "received", "retransmitted"))
    rows: list[dict[str, Any]] = [
        {"round": 1, "bytes": Ledger(entries).totals(1), "seconds": {}},
        {"round": 2, "bytes": Ledger(entries).totals(2) | {"wire": {"source": source, **totals}}, "seconds": {}},
    ]
    run = RunFolder.create(folder, 'rounds = 2\nreduce = "ordered"\n[algorithm]\nname = "fedavg"\n')
    for row in rows:
        run.append_metrics(row)
    partition = PartitionRecord([np.array([client]) for client in range(10)], np.ones((10, 1), np.int64), sha256="p")
    provenance = {"ranks": 3, "hosts": list(hosts), "wire": source if measured else "not measured: shared memory"}
    columns = Ledger(entries).columns(), partition, provenance, [], wire.columns(), wire.flow_columns()
    write_record(run.record, rows, *columns)
    run.write_summary(
        summarise(
            **dict.fromkeys(("algorithm", "model", "data", "partition_sha256", "job_sha256"), "x"),  # type: ignore[arg-type]
            **dict.fromkeys(("clients", "ranks", "seed", "parameters"), 3),  # type: ignore[arg-type]
            metrics_rows=rows,
            bytes_by_kind={},
        )
    )
    return read_run(folder)


def words(run: Run) -> str:
    """The remarks beneath the table, on one line."""
    table = traffic_table(run)
    assert table is not None
    return " ".join(table.notes)


def test_the_table_by_hand(tmp_path: Path) -> None:
    """Of round 2 alone, the measured one. Down: 2 MB filled by ranks 1 and 2, 2 MB + 250 on the wire. Up: 4 MB sent by
    them, 4 MB on the wire."""
    run = make_run(tmp_path / "a")
    assert run.record is not None
    assert bytes_of(run.record, "down") == Bytes(10 * MB, MB, 2 * MB, 2 * MB + 250, 50)
    assert bytes_of(run.record, "up") == Bytes(10 * MB, 6 * MB, 4 * MB, 4 * MB)
    assert bytes_of(run.record) == Bytes(20 * MB, 7 * MB, 6 * MB, 6 * MB + 250, 50)
    table = traffic_table(run)
    assert table is not None
    assert [cell.text for cell in table.rows[0]] == ["down", "10.0", "1.00", "2.00", "2.00", "1.000"]
    assert [cell.text for cell in table.rows[1]] == ["up", "10.0", "6.00", "4.00", "4.00", "1.000"]
    assert flow_matrix(run.record, "up").tolist() == [[0, 0, 0], [MB, 0, MB], [2 * MB, 0, 0]]


def by_kind(record: Record, down: str, collectives: object = "library") -> Record:
    """The same with kinds on the wire: down of `down`, up of `update`; and the downloads half of a control variate."""
    directions = record.wire["direction"]
    record.wire["kind"] = np.where(directions == "down", down, "update")
    ledger = {name: np.repeat(column, 2) for name, column in record.ledger.items()}
    for name in ("logical", "mpi_sent", "mpi_received"):
        ledger[name] = ledger[name] // 2
    ledger["kind"] = np.where(
        (ledger["direction"] == "down") & (np.arange(len(ledger["kind"])) % 2), "control", ledger["kind"]
    )
    record.ledger.update(ledger)
    record.provenance["collectives"] = collectives
    return record


def test_kinds_of_one_message_stand_in_one_row(tmp_path: Path) -> None:
    """The bytes of a message of two kinds are nowhere split; where each had its own, each has its row."""
    run = make_run(tmp_path / "a")
    assert run.record is not None
    assert messages(run.record, "down") == [("model",)]
    record = by_kind(run.record, "control+model")
    assert messages(record, "down") == [("control", "model")] and messages(record, "up") == [("update",)]
    assert bytes_of(record, "down", ["control", "model"]) == Bytes(10 * MB, MB, 2 * MB, 2 * MB + 250, 50)
    table = traffic_table(run)
    assert table is not None
    assert [row[0].text for row in table.rows] == ["down", "down control+model", "up", "up update", "control", "all"]
    assert [cell.text for cell in table.rows[1]][1:] == [cell.text for cell in table.rows[0]][1:]
    assert "measured together" in " ".join(table.notes)

    record.wire["kind"] = np.where(record.wire["direction"] == "down", "model", "update")
    assert messages(record, "down") == [("control",), ("model",)]
    assert bytes_of(record, "down", ["control"]) == Bytes(5 * MB, MB // 2, MB, 0)


def test_what_goes_along_routes_is_counted_where_it_is_sent(tmp_path: Path) -> None:
    """Up by node: 2 MB from rank 2 to rank 1, which sends 2 MB on; rank 0, which gives nothing, hands nothing over."""
    run = make_run(tmp_path / "a")
    record = run.record
    assert record is not None
    up = record.ledger["direction"] == "up"
    record.ledger["mpi_sent"][up] = [0, 2 * MB, 2 * MB] * 2
    record.ledger["mpi_received"][up] = [2 * MB, 2 * MB, 0] * 2
    record.provenance["collectives"] = {"up.update": "hierarchical"}
    assert bytes_of(record, "up").mpi_between == 4 * MB and bytes_of(record, "down").mpi_between == 2 * MB
    record.provenance["collectives"] = "library"
    assert bytes_of(record, "up").mpi_between == 6 * MB


def test_a_record_of_before_there_were_kinds(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a").path / "run.h5"
    with h5py.File(path, "a") as file:
        del file["wire/kind"]
    record = read_record(path)
    assert set(record.wire["kind"]) == {""} and bytes_of(record, "down").wire == 2 * MB + 250
    table = traffic_table(read_run(path.parent))
    assert table is not None and len(table.rows) == 4


def test_the_words_are_about_this_run(tmp_path: Path) -> None:
    """Headers: 2,000,250 on the wire, less 2,000,000 of payload and 50 sent again."""
    said = words(make_run(tmp_path / "a"))
    for part in (
        "of every client, of 10",
        "8 bytes an element",
        "Down, 1.00 MB were sent by other ranks than rank 0",
        "Up, 1.00 MB went to other ranks than rank 0",
        "50 bytes were sent again",
        "small talk are 200 bytes, 0.01 %",
        "(tcp_info)",
    ):
        assert part in said, part
    assert "shared memory, and a ratio below 1" not in said  # each rank is alone on its host


def test_ranks_that_share_a_node(tmp_path: Path) -> None:
    assert "2 of 3 ranks share a node" in words(make_run(tmp_path / "a", hosts=("a", "a", "b")))


def test_interfaces_know_no_pairs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", source="interface")
    said = words(run)
    assert "everything that the nodes sent, by whomever" in said and "other ranks than rank 0" not in said
    assert run.record is not None and flow_matrix(run.record, "down").shape == (0, 0)


def test_what_was_not_measured_has_no_number(tmp_path: Path) -> None:
    """All rounds then: twice the bytes."""
    table = traffic_table(make_run(tmp_path / "a", source="not measured"))
    assert table is not None
    assert [cell.text for cell in table.rows[0]] == ["down", "20.0", "2.00", "4.00", "-", "-"]
    assert table.notes[-1] == "Wire bytes: not measured: shared memory."


@pytest.mark.parametrize("source", ["tcp_info", "not measured"])
def test_the_report_has_table_and_heat_map(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", source)
    assert main([str(run.path)]) == 0
    table = traffic_table(run)
    assert table is not None
    assert as_text(table) in capsys.readouterr().out
    page = (run.path / "report/report.md").read_text()
    assert "## Logical, MPI and wire bytes of a" in page
    drawn = (run.path / "report/traffic-a.png").exists()
    assert drawn == ("(traffic-a.png)" in page) == (source == "tcp_info")


def test_one_rank_has_no_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert run.record is not None
    run.record.provenance["ranks"] = 1
    assert traffic_table(run) is None


def test_a_flow_of_a_rank_that_is_gone_is_kept(tmp_path: Path) -> None:
    """A run that was resumed on fewer ranks."""
    wire = WireLedger([WireEntry(1, "p", "up", 4, 5, 0, 0)], [Flow("up", 4, 0, 5)])
    write_record(tmp_path / "run.h5", [], Ledger().columns(), None, {}, [], wire.columns(), wire.flow_columns())
    assert flow_matrix(read_record(tmp_path / "run.h5"), "up").tolist()[4] == [5, 0, 0, 0, 0]
