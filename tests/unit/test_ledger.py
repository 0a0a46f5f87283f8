"""The ledger: totals by round and kind, and that it survives JSON."""

from __future__ import annotations

import json

from mpifed.comm.ledger import Entry, Flow, Ledger, WireEntry, WireLedger, label, unlabel

ENTRIES = [
    Entry(1, "train", "down", "model", 0, 0, 40, 0),
    Entry(1, "train", "down", "model", 1, 80, 0, 40),
    Entry(1, "train", "up", "update", 0, 0, 0, 80),
    Entry(1, "train", "up", "update", 1, 80, 80, 0),
    Entry(1, "train", "up", "weight", 1, 16, 0, 0),
    Entry(1, "", "control", "control", 1, 0, 7, 9),
    Entry(2, "digest", "up", "update", 1, 5, 6, 0),
]


def test_totals() -> None:
    """Round 1: down 80, up 80 + 16; handed to MPI 40 + 80 + 7 to send, 40 + 80 + 9 to fill. Control is in MPI alone."""
    ledger = Ledger(ENTRIES)
    assert ledger.totals(1) == {"logical": {"up": 96, "down": 80}, "mpi": {"sent": 127, "received": 129}}
    assert ledger.totals(2) == {"logical": {"up": 5, "down": 0}, "mpi": {"sent": 6, "received": 0}}
    assert ledger.totals() == {"logical": {"up": 101, "down": 80}, "mpi": {"sent": 133, "received": 129}}
    assert Ledger().totals() == {"logical": {"up": 0, "down": 0}, "mpi": {"sent": 0, "received": 0}}


def test_by_kind_adds_rounds_phases_and_ranks() -> None:
    assert Ledger(ENTRIES).by_kind() == {"down.model": 80, "up.update": 85, "up.weight": 16}


def test_rows_survive_json() -> None:
    ledger = Ledger(ENTRIES)
    again = Ledger.from_rows(json.loads(json.dumps(ledger.rows())))
    assert again.entries == ENTRIES and Ledger.from_rows([]).entries == []


def test_columns() -> None:
    columns = Ledger(ENTRIES[:2]).columns()
    assert columns == {
        "round": [1, 1],
        "phase": ["train", "train"],
        "direction": ["down", "down"],
        "kind": ["model", "model"],
        "rank": [0, 1],
        "logical": [0, 80],
        "mpi_sent": [40, 0],
        "mpi_received": [0, 40],
    }


def test_wire_bytes() -> None:
    """Two rounds of 0 -> 1: 100 bytes, 4 of them twice, and 90. A rank that moved nothing has no entry."""
    ledger = WireLedger()
    ledger.add(1, "train", "down", [(104, 0, 4), (0, 100, 0), (0, 0, 0)], {(0, 1): 104})
    ledger.add(2, "train", "down", [(90, 0, 0), (0, 90, 0), (0, 0, 0)], {(0, 1): 90})
    ledger.add(2, "", "control", [(0, 0, 0)] * 3, {})
    assert ledger.totals(1) == {"sent": 104, "received": 100, "retransmitted": 4}
    assert ledger.totals(2) == {"sent": 90, "received": 90, "retransmitted": 0}
    assert ledger.totals(3) == {"sent": 0, "received": 0, "retransmitted": 0}
    assert ledger.entries[:2] == [
        WireEntry(1, "train", "down", 0, 104, 0, 4),
        WireEntry(1, "train", "down", 1, 0, 100, 0),
    ]
    assert ledger.flows == [Flow("down", 0, 1, 194)] and len(ledger.entries) == 4
    again = WireLedger.from_rows(json.loads(json.dumps(ledger.rows())))
    again.add(3, "train", "down", [(6, 0, 0)], {(0, 1): 6})  # of a resumed run: sums go on
    assert again.entries[:4] == ledger.entries and again.flows == [Flow("down", 0, 1, 200)]
    assert ledger.columns()["received"] == [0, 100, 0, 90] and ledger.flow_columns()["sent"] == [194]


def test_wire_bytes_by_kind() -> None:
    """What a checkpoint of before there were kinds holds is read without them."""
    ledger = WireLedger.from_rows([[[1, "train", "down", 0, 104, 0, 4]], []])
    ledger.add(2, "train", "down", [(7, 0, 0)], {}, "generator+model")
    assert ledger.columns()["kind"] == ["", "generator+model"]
    assert ledger.entries[1] == WireEntry(2, "train", "down", 0, 7, 0, 0, "generator+model")


def test_labels() -> None:
    for place in (("train", "up", "update"), ("a-b", "down", "x.y")):
        assert unlabel(label(*place)) == place
    assert unlabel("control") == ("", "control", "control")
