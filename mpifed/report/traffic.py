"""Logical, MPI and wire bytes of a run beside each other, and in words why they differ.

Every sentence is about this run: it stands where the record shows what it says, with the bytes that it explains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpifed.job import route_among
from mpifed.progress import megabytes
from mpifed.report.layout import Cell, Table
from mpifed.report.runs import Run
from mpifed.storage.record import Record

HEADER = ("direction, kind", "logical MB", "MPI sent MB", "MPI between ranks, MB", "wire MB", "wire / MPI")
DIRECTIONS = ("down", "up", "control")

JOIN = "+"
"""Between the kinds of one message, in the names of wire bytes (`mpifed.comm.ledger`)."""

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
    mpi_between: int
    """Of the library's collectives what ranks other than 0 send or fill; along routes all that is sent."""
    wire: int | None
    retransmitted: int = 0

    @property
    def ratio(self) -> float | None:
        """Wire bytes over those between ranks: of the library's collectives one end is rank 0, of routes any rank."""
        return self.wire / self.mpi_between if self.wire is not None and self.mpi_between else None


def bytes_of(record: Record, direction: str | None = None, kinds: Sequence[str] | None = None) -> Bytes:
    """The bytes of a direction, or of some `kinds` in it that no message carried together with others; None: of all."""
    ledger, wire = record.ledger, record.wire
    measured = bool(len(wire.get("round", ())))
    chosen = np.ones(len(ledger["round"]), bool)
    if measured:
        chosen &= np.isin(ledger["round"], wire["round"])
    if direction is not None:
        chosen &= ledger["direction"] == direction
    if kinds is not None:
        chosen &= np.isin(ledger["kind"], kinds)
    routed = _along_routes(record)
    others = chosen & (ledger["rank"] > 0) & ~routed
    between = (ledger["mpi_sent"] + ledger["mpi_received"])[others].sum() + ledger["mpi_sent"][chosen & routed].sum()
    on_wire = np.ones(len(wire["round"]) if measured else 0, bool)
    if measured and direction is not None:
        on_wire &= wire["direction"] == direction
    if measured and kinds is not None:
        on_wire &= [set(name.split(JOIN)) <= set(kinds) for name in wire["kind"]]
    return Bytes(
        int(ledger["logical"][chosen].sum()),
        int(ledger["mpi_sent"][chosen].sum()),
        int(between),
        int(wire["sent"][on_wire].sum()) if measured else None,
        int(wire["retransmitted"][on_wire].sum()) if measured else 0,
    )


def _along_routes(record: Record) -> npt.NDArray[np.bool_]:
    """Which entries of the ledger are of messages from rank to rank, and not of the library's collectives."""
    collectives, ledger = record.provenance.get("collectives", "library"), record.ledger
    routed = np.zeros(len(ledger["round"]), bool)
    for direction in ("down", "up"):
        own = ledger["direction"] == direction
        for kind in np.unique(ledger["kind"][own]):
            if route_among(collectives, direction, str(kind)) != "library":
                routed |= own & (ledger["kind"] == kind)
    return routed


def messages(record: Record, direction: str) -> list[tuple[str, ...]]:
    """The kinds of a direction, those together that some message carried together; each by itself where no wire bytes
    were measured, or none by kind."""
    ledger, wire = record.ledger, record.wire
    together = [{str(kind)} for kind in np.unique(ledger["kind"][ledger["direction"] == direction])]
    for name in np.unique(wire["kind"][wire["direction"] == direction]) if len(wire.get("round", ())) else ():
        joined = set(str(name).split(JOIN))
        together = [kinds for kinds in together if not kinds & joined] + [
            joined.union(*(kinds for kinds in together if kinds & joined))
        ]
    return sorted(tuple(sorted(kinds)) for kinds in together if kinds != {""})


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
    by_kind = bool(any(record.wire.get("kind", ())))
    rows = []
    for direction in DIRECTIONS:
        rows.append(_row(direction, bytes_of(record, direction)))
        kinds = messages(record, direction) if direction != "control" and by_kind else []
        rows += [_row(f"{direction} {JOIN.join(some)}", bytes_of(record, direction, some)) for some in kinds]
    rows.append(_row("all", bytes_of(record)))
    return Table(f"Logical, MPI and wire bytes of {run.name}", HEADER, rows, _words(run, record))


def _row(name: str, found: Bytes) -> list[Cell]:
    return [
        Cell(name),
        *(Cell(megabytes(size)) for size in (found.logical, found.mpi_sent, found.mpi_between)),
        Cell("-" if found.wire is None else megabytes(found.wire)),
        Cell("-" if found.ratio is None else f"{found.ratio:.3f}"),
    ]


def _words(run: Run, record: Record) -> list[str]:
    ranks = int(record.provenance["ranks"])
    clients = None if record.partition is None else len(record.partition.train)
    down, up = bytes_of(record, "down"), bytes_of(record, "up")
    notes = []
    if clients is not None and down.logical != down.mpi_between:
        notes.append(
            f"Logical: a download and an upload of every client, of {clients}. MPI between ranks: what the {ranks - 1} "
            "ranks but 0 send or fill, as every collective of MPI has rank 0 at one end"
            + ("; of messages along routes what is sent. " if _along_routes(record).any() else ". ")
            + "Clients of one rank share its download."
        )
    if up.mpi_between and up.logical != up.mpi_between:
        notes.append(
            "Up, sums and means of long vectors are added up on a rank first and travel as one vector a rank, "
            + ("of 4 bytes an element" if run.job.get("reduce") == "tree" else "of 8 bytes an element, so exact")
            + "; other replies travel one by one."
        )
    if down.wire is None:
        notes.append(f"Wire bytes: {record.provenance.get('wire', 'not measured')}.")
        return notes
    if any(JOIN in str(name) for name in record.wire.get("kind", ())):
        notes.append(f"Kinds that travel in one message are measured together, and so stand in one row (`a{JOIN}b`).")
    source = str(run.totals["bytes"]["wire"]["source"])
    notes.append(f"Wire: {'; '.join(HOLDS.get(name, name) for name in source.split(' and '))} ({source}).")
    return notes + _moved(record, source) + _hosts(record, source)


def _moved(record: Record, source: str) -> list[str]:
    """What the counters say about headers, relays and what was sent again."""
    notes = []
    downwards, upwards = flow_matrix(record, "down"), flow_matrix(record, "up")
    relayed = int(downwards[1:].sum())
    by = "the library's broadcast goes" if not _along_routes(record).any() else "a broadcast goes"
    added = "the library's reduction" if not _along_routes(record).any() else "a sum along a route, or the library's,"
    down, up, everything = (bytes_of(record, direction) for direction in ("down", "up", None))
    if relayed > 0.01 * max(1, down.wire or 0):
        notes.append(
            f"Down, {megabytes(relayed)} MB were sent by other ranks than rank 0: {by} along a "
            "tree, by which every rank is still sent it once, or in parts, which a ratio above 1 shows."
        )
    elsewhere = int(upwards[:, 1:].sum())
    if elsewhere > 0.01 * max(1, up.wire or 0):
        notes.append(
            f"Up, {megabytes(elsewhere)} MB went to other ranks than rank 0: {added} adds up along a "
            "tree, or has every rank add up a part of the vectors and gathers the parts, which a ratio above 1 shows."
        )
    if everything.retransmitted:
        notes.append(f"{everything.retransmitted:,} bytes were sent again, after a loss or what TCP took for one.")
    surplus = (down.wire or 0) - down.mpi_between - down.retransmitted
    if source == "tcp_info" and down.mpi_between and 0 <= surplus < 0.05 * down.mpi_between:
        share = 100 * surplus / down.mpi_between
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
