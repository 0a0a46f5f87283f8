"""The ledger: what crossed the network, by round, phase, direction, kind and rank. A leaf: plain numbers.

Logical bytes are what the papers count: every client's own download and upload, after the codec. MPI bytes are the
lengths of the buffers that a rank handed to MPI, to be sent or to be filled. Wire bytes are what a counter of the
transport moved on (`mpifed.comm.wire`), message by message; where one carried several kinds, theirs together.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

WEIGHT = "weight"
"""Kind of the 8 bytes (a float64) that a reply carries as its weight, where some field is a weighted mean."""

JOIN = "+"
"""Between the kinds of one message, in alphabetical order; no name of a kind holds it."""


@dataclass(frozen=True)
class Entry:
    """Bytes of one kind in one round on one rank; `direction` is "down", "up" or "control"."""

    round: int
    phase: str
    direction: str
    kind: str
    rank: int
    logical: int
    mpi_sent: int
    mpi_received: int


_NAMES = tuple(Entry.__dataclass_fields__)
_VALUES = attrgetter(*_NAMES)


class Ledger:
    """The entries of a run, at rank 0, by ascending round."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = list(entries)

    def totals(self, round_: int | None = None) -> dict[str, dict[str, int]]:
        """`{"logical": {"up", "down"}, "mpi": {"sent", "received"}}` of one round, or of all."""
        chosen = self.entries
        if round_ is not None:
            of_round = attrgetter("round")
            first, end = (find(self.entries, round_, key=of_round) for find in (bisect_left, bisect_right))
            chosen = self.entries[first:end]
        logical = {way: sum(e.logical for e in chosen if e.direction == way) for way in ("up", "down")}
        mpi = {"sent": sum(e.mpi_sent for e in chosen), "received": sum(e.mpi_received for e in chosen)}
        return {"logical": logical, "mpi": mpi}

    def by_kind(self) -> dict[str, int]:
        """Logical bytes of the run by "direction.kind"."""
        kinds: dict[str, int] = {}
        for entry in self.entries:
            if entry.logical:
                key = f"{entry.direction}.{entry.kind}"
                kinds[key] = kinds.get(key, 0) + entry.logical
        return kinds

    def rows(self) -> list[list[Any]]:
        """Entries as JSON-able rows."""
        return [list(_VALUES(entry)) for entry in self.entries]

    @classmethod
    def from_rows(cls, rows: Iterable[Iterable[Any]]) -> Ledger:
        """The inverse of `rows`."""
        return cls(Entry(*row) for row in rows)

    def columns(self) -> dict[str, list[Any]]:
        """Entries column by column, by field name."""
        return {name: [getattr(entry, name) for entry in self.entries] for name in _NAMES}


@dataclass(frozen=True)
class WireEntry:
    """What a rank's counter moved on in one part of a round; `direction` as in `Entry`.

    `kind`: of several kinds of one message all, joined by `JOIN`; empty where it was written before there were kinds.
    """

    round: int
    phase: str
    direction: str
    rank: int
    sent: int
    received: int
    retransmitted: int  # of `sent`
    kind: str = ""


@dataclass(frozen=True)
class Flow:
    """Bytes from one rank to another in all rounds, where the counter knows to whom they went."""

    direction: str
    sender: int
    receiver: int
    sent: int


class WireLedger:
    """The wire bytes of a run, at rank 0, by ascending round; empty where nothing is measured."""

    def __init__(self, entries: Iterable[WireEntry] = (), flows: Iterable[Flow] = ()) -> None:
        self.entries = list(entries)
        self._flows = {(flow.direction, flow.sender, flow.receiver): flow.sent for flow in flows}

    def add(
        self,
        round_: int,
        phase: str,
        direction: str,
        by_rank: Sequence[tuple[int, int, int]],
        flows: Mapping[tuple[int, int], int],
        kind: str = "",
    ) -> None:
        """Write down a part of a round: (sent, received, retransmitted) by rank, and bytes by (sender, receiver)."""
        self.entries += [
            WireEntry(round_, phase, direction, rank, *count, kind) for rank, count in enumerate(by_rank) if any(count)
        ]
        for (sender, receiver), sent in flows.items():
            key = direction, sender, receiver
            self._flows[key] = self._flows.get(key, 0) + sent

    def totals(self, round_: int) -> dict[str, int]:
        """`{"sent", "received", "retransmitted"}` of one round."""
        of_round = attrgetter("round")
        first, end = (find(self.entries, round_, key=of_round) for find in (bisect_left, bisect_right))
        chosen = self.entries[first:end]
        return {name: sum(getattr(e, name) for e in chosen) for name in ("sent", "received", "retransmitted")}

    @property
    def flows(self) -> list[Flow]:
        """By direction, sender and receiver."""
        return [Flow(*key, self._flows[key]) for key in sorted(self._flows)]

    def rows(self) -> list[list[list[Any]]]:
        """Entries and flows as JSON-able rows."""
        return [[list(vars(one).values()) for one in part] for part in (self.entries, self.flows)]

    @classmethod
    def from_rows(cls, rows: Sequence[Iterable[Iterable[Any]]]) -> WireLedger:
        """The inverse of `rows`."""
        entries, flows = rows
        return cls((WireEntry(*row) for row in entries), (Flow(*row) for row in flows))

    def columns(self) -> dict[str, list[Any]]:
        """Entries column by column, by field name."""
        return {name: [getattr(entry, name) for entry in self.entries] for name in WireEntry.__dataclass_fields__}

    def flow_columns(self) -> dict[str, list[Any]]:
        """Flows column by column, by field name."""
        return {name: [getattr(flow, name) for flow in self.flows] for name in Flow.__dataclass_fields__}


def label(phase: str, direction: str, kind: str) -> str:
    """The traffic label of one kind of message."""
    return f"{phase}/{direction}/{kind}"


def unlabel(text: str) -> tuple[str, str, str]:
    """(phase, direction, kind) of a traffic label; mpifed's own messages belong to no phase."""
    phase, _, rest = text.partition("/")
    direction, _, kind = rest.partition("/")
    return (phase, direction, kind) if kind else ("", "control", text)
