"""What a counter of wire bytes is, whatever it reads. A leaf: plain numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

Flows = dict[tuple[int, int], int]
"""Bytes by (sending rank, receiving rank)."""


class Count(NamedTuple):
    """Bytes that went out, that came in, and those of the ones that went out which went out a second time."""

    sent: int = 0
    received: int = 0
    retransmitted: int = 0

    def plus(self, other: Count) -> Count:
        return Count(*(mine + more for mine, more in zip(self, other, strict=True)))

    def since(self, before: Count) -> Count:
        """What was counted after `before`; a counter that has gone back began anew in between."""
        return Count(*(now - then if now >= then else now for now, then in zip(self, before, strict=True)))


Counts = Mapping[str, Count]
"""By what the source tells apart: a rank, a connection, an interface."""


class Unreadable(Exception):
    """A source that cannot be read here; the message says why, as half a sentence."""


class Source(Protocol):
    """A counter on this rank, that only grows."""

    name: str
    """As the record calls it."""

    def read(self) -> Counts:
        """What has been counted so far. Costs microseconds."""
        ...

    def join(self, known: Sequence[Sequence[str]], counts: Sequence[Counts]) -> tuple[list[Count], Flows]:
        """Bytes of every rank, and between ranks where the source tells these apart.

        Args:
            known: by rank, all names under which it has counted so far, in any interval.
            counts: by rank, what it counted in one interval.
        """
        ...


def joined(sent: Iterable[tuple[int, int, Count]], ranks: int) -> tuple[list[Count], Flows]:
    """Totals by rank, and flows, of what each rank counted as sent: (sender, receiver, count).

    What a rank received is what the others sent to it, but for what they sent again: a sender knows to which part of a
    round its message belongs, while it may be with the receiver before that has come to it.
    """
    totals = [Count()] * ranks
    flows: Flows = defaultdict(int)
    for sender, receiver, count in sent:
        if sender != receiver and any(count):
            totals[sender] = totals[sender].plus(count)
            totals[receiver] = totals[receiver].plus(Count(received=count.sent - count.retransmitted))
            flows[sender, receiver] += count.sent
    return totals, dict(flows)
