"""Seconds of a collective: textbook formulas by latency and bandwidth, or what was measured.

With p ranks, n bytes, a latency (seconds a message), b seconds a byte and c seconds a byte that is added, after Thakur,
Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH, Int. J. of High Performance Computing
Applications 19(1), 2005, sections 4 and 5:

- broadcast: along a binomial tree, ceil(log2 p) (a + n b), below 12 KiB or 8 ranks; else scattered and gathered in a
  ring, (ceil(log2 p) + p - 1) a + 2 (p - 1)/p n b.
- reduce: binomial, ceil(log2 p) (a + n (b + c)), below 2 KiB; else Rabenseifner's reduce-scatter and gather,
  2 ceil(log2 p) a + 2 (p - 1)/p n b + (p - 1)/p n c.
- sum on all ranks: recursive doubling, ceil(log2 p) (a + n (b + c)), below 2 KiB; else Rabenseifner's, as above.
- gather and scatter of unequal parts: one message after the other at rank 0, (p - 1) a + n b, n the others' bytes.

Of several ranks on each node the network joins nodes, and memory the ranks of one: the two costs are added, the first
with the nodes as p, the second with a node's ranks. Along a route of the job's (`mpifed.comm.routes`) copies and sums
take (p - 1) (a + n b) flat, ceil(log2 p) (a + n b) along a tree over all ranks, and hierarchically a tree over the
nodes and one over a node's ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpifed.comm.routes import Route
from mpifed.predict.bytes import Call, Operation

SHORT_BROADCAST = 12 << 10
FEW_RANKS = 8
SHORT_REDUCE = 2 << 10
ADD = 1 / 4e9
"""Seconds a byte that is added."""


@dataclass(frozen=True)
class Link:
    """Seconds a message, and seconds a byte."""

    latency: float
    per_byte: float


MEMORY = Link(50e-6, 1 / 2e9)
"""Between ranks of one node, polled, where nothing was measured."""


@dataclass(frozen=True)
class Places:
    """Which node each rank is on."""

    hosts: Sequence[str]

    @property
    def nodes(self) -> int:
        return len(set(self.hosts))

    @property
    def largest(self) -> int:
        """Ranks of the node with the most."""
        return max(list(self.hosts).count(host) for host in set(self.hosts))


def collective(operation: Operation, ranks: int, size: float, link: Link, add: float = ADD) -> float:
    """Seconds of one collective of `ranks` equals; `size` as `Call.size` has it (see the module)."""
    if ranks < 2:
        return 0.0
    depth, share = math.ceil(math.log2(ranks)), (ranks - 1) / ranks
    a, b = link.latency, link.per_byte
    if operation in ("gather", "scatter"):
        return (ranks - 1) * a + size * b
    if operation == "broadcast":
        if size < SHORT_BROADCAST or ranks < FEW_RANKS:
            return depth * (a + size * b)
        return (depth + ranks - 1) * a + 2 * share * size * b
    if size < SHORT_REDUCE:
        return depth * (a + size * (b + add))
    return 2 * depth * a + 2 * share * size * b + share * size * add


# --- a network --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Textbook:
    """What the formulas say of ranks on nodes."""

    network: Link
    memory: Link = MEMORY

    def seconds(self, call: Call, places: Places) -> float:
        """Of a call, all of its pieces."""
        return self.of(call.operation, _sizes(call, places), places, call.pieces, call.route)

    def of(
        self,
        operation: Operation,
        sizes: tuple[float, float],
        places: Places,
        pieces: int = 1,
        route: Route = "library",
    ) -> float:
        """`sizes`: bytes that cross the network, and that stay on a node (the same for all but gather and scatter)."""
        across, within = (size / pieces for size in sizes)
        if route != "library" and operation in ("broadcast", "reduce"):
            return pieces * self._along(route, across, places, ADD if operation == "reduce" else 0.0)
        if route == "hierarchical":  # one message from each node
            network = collective(operation, places.nodes, across, self.network)
            return pieces * (network + collective(operation, places.largest, within, self.memory))
        network = collective(operation, places.nodes, across, self.network)
        if operation in ("gather", "scatter") and places.nodes > 1:  # every rank elsewhere is a message
            elsewhere = sum(host != places.hosts[0] for host in places.hosts)
            network = elsewhere * self.network.latency + across * self.network.per_byte
        return pieces * (network + collective(operation, places.largest, within, self.memory))

    def _along(self, route: Route, size: float, places: Places, add: float) -> float:
        """Of a copy for everybody, or a sum, along a route."""
        first = places.hosts[0]
        across, within = (link.latency + size * (link.per_byte + add) for link in (self.network, self.memory))
        if route == "flat":
            elsewhere = sum(host != first for host in places.hosts)
            return elsewhere * across + (len(places.hosts) - 1 - elsewhere) * within
        if route == "tree":
            return math.ceil(math.log2(max(1, len(places.hosts)))) * (across if places.nodes > 1 else within)
        return math.ceil(math.log2(places.nodes)) * across + math.ceil(math.log2(places.largest)) * within


@dataclass(frozen=True)
class Curve:
    """Seconds of one collective at some sizes in bytes, which ascend; a line between two, and beyond the last two.

    One latency and one bandwidth do not do: libraries send short and long messages in different ways, and links let
    bursts through that are faster than their rate. `link` is the best single line, for readers.
    """

    sizes: Sequence[float]
    seconds: Sequence[float]

    def at(self, size: float) -> float:
        n, t = np.asarray(self.sizes), np.asarray(self.seconds)
        if size <= n[-1] or len(n) < 2:
            return float(np.interp(size, n, t))
        return float(t[-1] + max(0.0, (t[-1] - t[-2]) / (n[-1] - n[-2])) * (size - n[-1]))

    @property
    def link(self) -> Link:
        return fit(self.sizes, self.seconds)


@dataclass(frozen=True)
class Measured:
    """Curves measured on `places`; elsewhere stretched as the textbook says."""

    curves: Mapping[Operation, Curve]
    places: Places

    def seconds(self, call: Call, places: Places) -> float:
        """Of a call, all of its pieces."""
        if len(places.hosts) < 2:
            return 0.0
        curve, (across, within) = self.curves[call.operation], _sizes(call, places)
        parts = call.operation in ("gather", "scatter")
        size = (across + within if parts else across) / call.pieces
        messages, bytes_ = self._stretch(call, places)
        latency = curve.at(0.0)
        transfer = curve.at(size) - latency
        return call.pieces * (latency * messages + transfer * (1.0 if parts else bytes_))

    def _stretch(self, call: Call, places: Places) -> tuple[float, float]:
        """How many times as many messages one after the other, and bytes, as where, and along what, it was measured."""
        same = (len(places.hosts), places.nodes) == (len(self.places.hosts), self.places.nodes)
        if same and call.route == "library":
            return 1.0, 1.0
        nothing, sizes = Link(0.0, 0.0), _sizes(call, places)
        several = self.places.nodes > 1
        ratios = []
        for one in (Link(1.0, 0.0), Link(0.0, 1.0)):
            model = Textbook(one, nothing) if several else Textbook(nothing, one)
            there = model.of(call.operation, sizes, self.places)
            here = model.of(call.operation, sizes, places, route=call.route)
            ratios.append(here / there if there > 0 else 1.0)
        return ratios[0], ratios[1]


def _sizes(call: Call, places: Places) -> tuple[float, float]:
    """Bytes that cross the network in a call, and that stay on a node."""
    arrays = (call.received if call.operation in ("broadcast", "scatter") else call.sent).values()
    if not arrays:
        return 0.0, 0.0
    of_ranks = np.sum(list(arrays), axis=0)
    if call.operation not in ("gather", "scatter"):
        return (float(of_ranks.max()),) * 2
    if call.route == "hierarchical":  # a leader's messages hold its node's
        leaders = np.array([host not in places.hosts[:rank] for rank, host in enumerate(places.hosts)])
        across, within = of_ranks[leaders], of_ranks[~leaders]
        return float(across[1:].sum()), float(within.sum()) / max(1, places.nodes)
    elsewhere = np.array([host != places.hosts[0] for host in places.hosts])
    here = ~elsewhere
    here[0] = False  # its own part goes nowhere
    return float(of_ranks[elsewhere].sum()), float(of_ranks[here].sum())


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """The line seconds = latency + size * per_byte of least squares, neither part below zero."""
    n, t = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    (latency, per_byte), *_ = np.linalg.lstsq(np.stack([np.ones_like(n), n], axis=1), t, rcond=None)
    if latency < 0:  # through the origin
        return Link(0.0, float((n * t).sum() / (n * n).sum()))
    return Link(float(latency), float(per_byte)) if per_byte >= 0 else Link(float(t.mean()), 0.0)
