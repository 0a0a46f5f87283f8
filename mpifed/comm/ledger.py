"""The ledger: what crossed the network, by round, phase, direction, kind and rank. A leaf: plain numbers.

Logical bytes are what the papers count: every client's own download and upload, after the codec. MPI bytes are the
lengths of the buffers that a rank handed to MPI, to be sent or to be filled.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

WEIGHT = "weight"
"""Kind of the 8 bytes (a float64) that a reply carries as its weight, where some field is a weighted mean."""


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


def label(phase: str, direction: str, kind: str) -> str:
    """The traffic label of one kind of message."""
    return f"{phase}/{direction}/{kind}"


def unlabel(text: str) -> tuple[str, str, str]:
    """(phase, direction, kind) of a traffic label; mpifed's own messages belong to no phase."""
    phase, _, rest = text.partition("/")
    direction, _, kind = rest.partition("/")
    return (phase, direction, kind) if kind else ("", "control", text)
