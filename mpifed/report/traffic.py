"""Logical, MPI and wire bytes of a run beside each other, and in words why they differ.

Every sentence is about this run: it stands where the record shows what it says, with the bytes that it explains.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpifed.progress import megabytes
from mpifed.report.layout import Cell, Table
from mpifed.report.runs import Run
from mpifed.storage.record import Record

HEADER = ("direction", "logical MB", "MPI sent MB", "MPI, ranks but 0, MB", "wire MB", "wire / MPI")
DIRECTIONS = ("down", "up", "control")

HOLDS = {
    "mpi_t": "Open MPI's own count of its messages: those within collectives and through shared memory too, without "
    "headers",
    "tcp_info": "the kernel's count of the ranks' TCP connections: the MPI library's headers and small talk too, "
    "without the headers of TCP, IP and Ethernet, and without shared memory within a node",
    "infiniband": "the nodes' InfiniBand ports: everything that the nodes sent, by whomever, with all headers",
    "interface": "the nodes' network interfaces: everything that the nodes sent, by whomever, with all headers and "
    "acknowledgements",
}


@dataclass(frozen=True)
class Bytes:
    """Of one direction, or of all, in the rounds whose wire bytes were measured (all rounds where none were)."""

    logical: int
    mpi_sent: int
    mpi_others: int  # sent or filled by ranks other than 0
    wire: int | None
    retransmitted: int = 0

    @property
    def ratio(self) -> float | None:
        """Wire bytes over what the ranks other than 0 were handed: one end of every collective is rank 0."""
        return self.wire / self.mpi_others if self.wire is not None and self.mpi_others else None


def bytes_of(record: Record, direction: str | None = None) -> Bytes:
    """The bytes of a direction; of all for None."""
    ledger, wire = record.ledger, record.wire
    measured = bool(len(wire.get("round", ())))
    chosen = np.ones(len(ledger["round"]), bool)
    if measured:
        chosen &= np.isin(ledger["round"], wire["round"])
    if direction is not None:
        chosen &= ledger["direction"] == direction
    others = chosen & (ledger["rank"] > 0)
    on_wire = wire["direction"] == direction if measured and direction is not None else slice(None)
    return Bytes(
        int(ledger["logical"][chosen].sum()),
        int(ledger["mpi_sent"][chosen].sum()),
        int((ledger["mpi_sent"] + ledger["mpi_received"])[others].sum()),
        int(wire["sent"][on_wire].sum()) if measured else None,
        int(wire["retransmitted"][on_wire].sum()) if measured else 0,
    )


def flow_matrix(record: Record, direction: str) -> npt.NDArray[np.int64]:
    """Bytes by sending and receiving rank, `[ranks, ranks]`; all zero where the source knows no pairs."""
    flows = record.wire_flows
    if not len(flows.get("sent", ())):
        return np.zeros((0, 0), np.int64)
    ranks = 1 + int(max(flows["sender"].max(), flows["receiver"].max()))
    matrix = np.zeros((ranks, ranks), np.int64)
    chosen = flows["direction"] == direction
    np.add.at(matrix, (flows["sender"][chosen], flows["receiver"][chosen]), flows["sent"][chosen])
    return matrix


def traffic_table(run: Run) -> Table | None:
    """The table of a run of several ranks; None where there is nothing to compare."""
    record = run.record
    if record is None or not len(record.ledger.get("round", ())) or int(record.provenance.get("ranks", 1)) < 2:
        return None
    rows = []
    for name, direction in (*((way, way) for way in DIRECTIONS), ("all", None)):
        found = bytes_of(record, direction)
        rows.append(
            [
                Cell(name),
                *(Cell(megabytes(size)) for size in (found.logical, found.mpi_sent, found.mpi_others)),
                Cell("-" if found.wire is None else megabytes(found.wire)),
                Cell("-" if found.ratio is None else f"{found.ratio:.3f}"),
            ]
        )
    return Table(f"Logical, MPI and wire bytes of {run.name}", HEADER, rows, _words(run, record))


def _words(run: Run, record: Record) -> list[str]:
    ranks = int(record.provenance["ranks"])
    clients = None if record.partition is None else len(record.partition.train)
    down, up = bytes_of(record, "down"), bytes_of(record, "up")
    notes = []
    if clients is not None and down.logical != down.mpi_others:
        notes.append(
            f"Logical: a download and an upload of every client, of {clients}. MPI, ranks but 0: what the {ranks - 1} "
            "others send or fill, as every collective has rank 0 at one end. Clients of one rank share its download."
        )
    if up.mpi_others and up.logical != up.mpi_others:
        notes.append(
            "Up, sums and means of long vectors are added up on a rank first and travel as one vector a rank, "
            + ("of 4 bytes an element" if run.job.get("reduce") == "tree" else "of 8 bytes an element, so exact")
            + "; other replies travel one by one."
        )
    if down.wire is None:
        notes.append(f"Wire bytes: {record.provenance.get('wire', 'not measured')}.")
        return notes
    source = str(run.totals["bytes"]["wire"]["source"])
    notes.append(f"Wire: {'; '.join(HOLDS.get(name, name) for name in source.split(' and '))} ({source}).")
    return notes + _moved(record, source) + _hosts(record, source)


def _moved(record: Record, source: str) -> list[str]:
    """What the counters say about headers, relays and what was sent again."""
    notes = []
    downwards, upwards = flow_matrix(record, "down"), flow_matrix(record, "up")
    relayed = int(downwards[1:].sum())
    down, up, everything = (bytes_of(record, direction) for direction in ("down", "up", None))
    if relayed > 0.01 * max(1, down.wire or 0):
        notes.append(
            f"Down, {megabytes(relayed)} MB were sent by other ranks than rank 0: the library's broadcast goes along a "
            "tree, by which every rank is still sent it once, or in parts, which a ratio above 1 shows."
        )
    elsewhere = int(upwards[:, 1:].sum())
    if elsewhere > 0.01 * max(1, up.wire or 0):
        notes.append(
            f"Up, {megabytes(elsewhere)} MB went to other ranks than rank 0: the library's reduction adds up along a "
            "tree, or has every rank add up a part of the vectors and gathers the parts, which a ratio above 1 shows."
        )
    if everything.retransmitted:
        notes.append(f"{everything.retransmitted:,} bytes were sent again, after a loss or what TCP took for one.")
    surplus = (down.wire or 0) - down.mpi_others - down.retransmitted
    if source == "tcp_info" and down.mpi_others and 0 <= surplus < 0.05 * down.mpi_others:
        share = 100 * surplus / down.mpi_others
        notes.append(f"Down, the library's headers and small talk are {surplus:,} bytes, {share:.2g} %.")
    return notes


def _hosts(record: Record, source: str) -> list[str]:
    hosts = record.provenance.get("hosts", [])
    together = sum(count for count in Counter(hosts).values() if count > 1)
    if source == "mpi_t" or together == 0 or len(set(hosts)) == 1:
        return []
    return [
        f"{together} of {len(hosts)} ranks share a node with others; what these say to each other goes through shared "
        "memory, and a ratio below 1 shows it."
    ]
