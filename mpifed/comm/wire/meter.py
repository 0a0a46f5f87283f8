"""Wire bytes of the rounds: which counter is read, when, and to what the difference of two readings belongs.

The counters are tried in this order, and the first that every rank can read, and that a probe moves, is taken:

1. `mpi_t`, where Open MPI counts its messages (`mpifed.comm.wire.mpi_t`)
2. `tcp_info`, where the ranks talk over TCP (`mpifed.comm.wire.tcp_info`)
3. `infiniband`, then `interface`, where there are several nodes (`mpifed.comm.wire.interface`)

Where none can be read, nothing is measured, and the record says so. Nothing here is computed from payloads.

A counter is read after every collective, and what it moved on belongs to what that carried. Where one message carried
several kinds, its bytes are those of all of them together, under a joined name, "generator+model": how much of it was
of which kind no counter says, and it is not worked out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpifed.comm.communicator import Communicator
from mpifed.comm.ledger import JOIN, unlabel
from mpifed.comm.wire.interface import InfiniBand, Interfaces
from mpifed.comm.wire.mpi_t import MpiT
from mpifed.comm.wire.source import Count, Counts, Flows, Source, Unreadable
from mpifed.comm.wire.tcp_info import TcpInfo

NOT_MEASURED = "not measured"
"""The source in the record where there is none."""

SOURCES = {
    "mpi_t": ("mpi_t",),
    "tcp_info": ("tcp_info",),
    "interface": ("infiniband", "interface"),
    "auto": ("mpi_t", "tcp_info", "infiniband", "interface"),
}
"""What `measure_wire` in a job stands for, in the order in which it is tried."""

PROBE_BYTES = 64 << 10
"""Of a broadcast that a counter has to have seen, on all ranks together, before it is believed."""


@dataclass
class Measured:
    """One interval of a round, on all ranks: bytes by rank, and between ranks where the source knows."""

    phase: str
    direction: str
    by_rank: list[Count]
    flows: Flows
    kind: str = ""  # of several kinds of one message, all joined by `JOIN`


@dataclass
class Meter:
    """Readings on this rank. `source` None: nothing is measured, no method does anything, and `reason` says why.

    A counter that can be read no more ends the measuring and not the run: `reason` says it, at rank 0 too.
    """

    comm: Communicator
    source: Source | None = None
    reason: str = ""
    _last: Counts = field(default_factory=dict)
    _unsaid: list[str] = field(default_factory=list)  # names that rank 0 has not been told
    _intervals: dict[tuple[str, str, str], dict[str, Count]] = field(default_factory=dict)  # phase, direction, kind
    _known: list[list[str]] = field(default_factory=list)  # by rank; at rank 0

    @property
    def name(self) -> str:
        """The source as the record calls it."""
        return NOT_MEASURED if self.source is None or self.reason else self.source.name

    def skip(self) -> None:
        """A round begins: what has been counted since the last was collected belongs to none."""
        self._difference()
        self._intervals = {}

    def moved(self, labels: Iterable[str]) -> None:
        """What was counted since the last reading belongs to the collective that has carried these labels."""
        if self.source is not None:
            carried = sorted(unlabel(label) for label in labels)
            phase, direction, _ = carried[0]  # a message is of one phase and direction
            self.count(phase, direction, JOIN.join(kind for _, _, kind in carried))

    def count(self, phase: str, direction: str, kind: str = "") -> None:
        """What was counted since the last reading belongs to that part of the round."""
        if self.source is None:
            return
        totals = self._intervals.setdefault((phase, direction, kind), {})
        for name, count in self._difference().items():
            totals[name] = totals.get(name, Count()).plus(count)

    def _difference(self) -> dict[str, Count]:
        if self.source is None or self.reason:
            return {}
        try:
            now, before = self.source.read(), self._last
        except Unreadable as error:
            self.reason = str(error)
            return {}
        self._unsaid += [name for name in now if name not in before]
        self._last = now
        differences = {name: count.since(before.get(name, Count())) for name, count in now.items()}
        return {name: count for name, count in differences.items() if any(count)}

    def collect(self) -> list[Measured]:
        """The intervals of the round, at rank 0; on the others, and where nothing is measured, an empty list.

        A message of its own, that belongs to no round.
        """
        if self.source is None:
            return []
        said = [self.reason, self._unsaid, [[*interval, counts] for interval, counts in self._intervals.items()]]
        self._unsaid, self._intervals = [], {}
        parts = self.comm.gather_json(said)
        if parts is None:
            return []
        self._known = self._known or [[] for _ in parts]
        by_interval: dict[tuple[str, str, str], list[dict[str, Count]]] = {}
        for rank, (problem, names, intervals) in enumerate(parts):
            self.reason = self.reason or problem
            self._known[rank] += names
            for phase, direction, kind, counts in intervals:
                everyone = by_interval.setdefault((phase, direction, kind), [{} for _ in parts])
                everyone[rank] = {name: Count(*count) for name, count in counts.items()}
        if self.reason:
            return []
        return [
            Measured(phase, direction, *self.source.join(self._known, counts), kind)
            for (phase, direction, kind), counts in by_interval.items()
        ]


def choose(comm: Communicator, wanted: str, hosts: Sequence[str]) -> Meter:
    """The meter of a job whose `measure_wire` is `wanted`, the same on every rank. Collective, but for one process.

    `hosts`: the host of every rank.
    """
    if wanted == "off":
        return Meter(comm, reason="measure_wire is off")
    if comm.survives and not comm.handle:
        return Meter(comm, reason="ranks have died, and what counts their messages counts by the ranks of the launcher")
    if comm.size == 1 or not comm.handle:
        return Meter(comm, reason="everything is in one process")
    reasons = []
    for name in SOURCES[wanted]:
        source, problem = None, None
        try:
            source = _MAKERS[name](comm, hosts)
        except Unreadable as error:
            problem = str(error)
        problem = comm.agree(problem) or _unmoved(comm, source)
        if problem is None:
            return Meter(comm, source)
        if problem not in reasons:
            reasons.append(problem)
    return Meter(comm, reason="; ".join(reasons))


def _unmoved(comm: Communicator, source: Source | None) -> str | None:
    """Send something, and say, the same on every rank, what is wrong where the counter has not seen it."""
    assert source is not None  # as nobody had a problem
    moved = np.zeros(2, np.float64)
    try:
        before = source.read()
        comm.broadcast(np.zeros(PROBE_BYTES, np.uint8), {})
        for name, count in source.read().items():
            moved += count.since(before.get(name, Count()))[:2]  # sent, received
        problem = None
    except Unreadable as error:
        problem = str(error)
    problem = comm.agree(problem)
    if problem is not None:
        return problem
    # an interface may count late, and others use it: it is believed unseen
    if source.name == "interface" or comm.sum_everywhere(moved).max() >= PROBE_BYTES:
        return None
    return {
        "mpi_t": "the MPI library's counters stand still",
        "tcp_info": "the ranks do not talk over TCP but through shared memory, or past the kernel",
    }.get(source.name, f"the counter {source.name} does not see the ranks' messages")


def _only_on_several_nodes(hosts: Sequence[str]) -> None:
    if len(set(hosts)) == 1:
        raise Unreadable("all ranks are on one node, whose network they do not use")


def _is_leader(comm: Communicator, hosts: Sequence[str]) -> bool:
    """The first rank of its node."""
    return hosts.index(hosts[comm.rank]) == comm.rank


def _make_interfaces(comm: Communicator, hosts: Sequence[str]) -> Source:
    _only_on_several_nodes(hosts)
    return Interfaces(_is_leader(comm, hosts))


def _make_infiniband(comm: Communicator, hosts: Sequence[str]) -> Source:
    _only_on_several_nodes(hosts)
    return InfiniBand(_is_leader(comm, hosts))


_MAKERS: dict[str, Callable[[Communicator, Sequence[str]], Source]] = {
    "mpi_t": lambda comm, hosts: MpiT(comm.handle, comm.size),
    "tcp_info": lambda comm, hosts: TcpInfo(),
    "infiniband": _make_infiniband,
    "interface": _make_interfaces,
}
