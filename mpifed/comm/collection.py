"""Bringing the replies of a phase to rank 0, each field in the way that it asks for, all fields of one way together.

- `Each` fields, and encoded fields of an ordered reduction: one gather.
- `Sum` and `Mean`, `reduce = "ordered"`: the same result bit for bit on any number of ranks. Long vectors
  (`EXACT_ELEMENTS`) are added exactly on each rank and then over the ranks in float64: rank 0 receives at most one
  vector from each, however many clients answered. Short ones, integers and float64 are gathered slice by slice and
  added in the order of client ids in float64. Either way rank 0 holds `SLICE_BYTES` beside the sum, never every model.
- `Sum` and `Mean`, `reduce = "tree"`: added in float64 on each rank, then by MPI in float32 (float64 for integers and
  float64): half the bytes, and the last bits depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mpifed.algorithms.base import Each, Field, Mean
from mpifed.codecs import Codec
from mpifed.comm.communicator import Communicator, Kinds
from mpifed.comm.ledger import label
from mpifed.comm.routes import Route
from mpifed.comm.summation import add_exactly, add_in_order, bound, peak
from mpifed.federation.roster import Assignment
from mpifed.types import State

SLICE_BYTES = 16 << 20
"""Most bytes that rank 0 receives at a time in an ordered reduction."""

EXACT_ELEMENTS = 1 << 14
"""From so many elements on, a plain floating-point field of at most 4 bytes an element is added exactly.

An exact sum is as fine as its largest element allows: right for a model, or its like, and not for a handful of numbers
of which one is a count and another a rate.
"""

GATHERED_RANKS = 4
"""The exact sums of so many ranks are gathered and added by rank 0; those of more are reduced by MPI.

Of few, gathering takes half the time; and a blocking reduction spins, which is dear where ranks outnumber cores.
"""

Sizes = dict[tuple[str, str], dict[int, int]]
"""Logical bytes by (direction, kind) and client."""


@dataclass
class Outgoing:
    """One client's encoded reply on its rank, waiting to be collected."""

    weight: float
    data: dict[str, Tensor]  # uint8, one axis
    lengths: dict[str, int]  # of the axis that is None in the declared shape
    memory: dict[str, State]  # the codecs' next memory
    peaks: dict[str, float] = field(default_factory=dict)  # largest magnitudes of the floating-point fields


@dataclass(frozen=True)
class Announcement:
    """What every rank knows of a phase's replies before they are collected."""

    clients: tuple[int, ...]  # those that answered, ascending
    weights: dict[int, float]
    nbytes: dict[str, dict[int, int]]  # by field and client
    lengths: dict[str, dict[int, int]]
    bounds: dict[str, float]  # of the fields that are added exactly (see `mpifed.comm.summation`)
    logical: Sizes


@dataclass
class Received:
    """`Uploads` at rank 0 (see `mpifed.algorithms.base`)."""

    fields: Mapping[str, Field]
    clients: Sequence[int]
    weights: Tensor
    device: torch.device
    totals: dict[str, Tensor] = field(default_factory=dict)  # reduced fields: weighted sums, float64, flat
    entries: dict[str, list[Tensor]] = field(default_factory=dict)  # `Each` fields
    exact: set[str] = field(default_factory=set)  # those of them that are added exactly, as they would be as `Mean`

    def mean(self, name: str) -> Tensor:
        rule = self.fields[name].reduce
        if not isinstance(rule, Mean | Each):
            raise TypeError(f"upload '{name}' is declared as {rule}, so it has no mean")
        if isinstance(rule, Each):
            total = self._added(name, [factor_of(rule, float(weight)) for weight in self.weights])
        else:
            total = self.totals[name]
        scale = float(self.weights.sum()) if rule.weights == "reply" else float(len(self.clients))
        if scale <= 0.0:
            raise ValueError(f"the weights of upload '{name}' add up to {scale}")
        return self._finished(name, total / scale)

    def sum(self, name: str) -> Tensor:
        rule = self.fields[name].reduce
        if isinstance(rule, Mean):
            raise TypeError(f"upload '{name}' is declared as {rule}, so its sum does not arrive")
        total = self._added(name, [1.0] * len(self.clients)) if isinstance(rule, Each) else self.totals[name]
        return self._finished(name, total)

    def each(self, name: str) -> Sequence[Tensor]:
        if name not in self.entries:
            raise TypeError(
                f"upload '{name}' is declared as {self.fields[name].reduce}, so single replies do not arrive"
            )
        return [tensor.to(self.device) for tensor in self.entries[name]]

    def _added(self, name: str, factors: Sequence[float]) -> Tensor:
        entries = self.entries[name]
        if name in self.exact:
            return add_exactly(entries, factors, entries[0].numel(), bound(map(peak, entries), factors))
        total = torch.zeros(entries[0].numel(), dtype=torch.float64)
        add_in_order(total, entries, factors)
        return total

    def _finished(self, name: str, total: Tensor) -> Tensor:
        declared = self.fields[name]
        if name in self.entries:
            shape = tuple(self.entries[name][0].shape)
        else:
            shape = tuple(int(length) for length in declared.shape if length is not None)
        if not declared.dtype.is_floating_point:
            total = total.round()
        return total.to(declared.dtype).view(shape).to(self.device)


def added_exactly(declared: Field, elements: int, plain: bool) -> bool:
    """How an ordered reduction adds a field: not by values, or numbers of ranks, but by what is declared of it."""
    dtype = declared.dtype
    return plain and dtype.is_floating_point and dtype.itemsize <= 4 and elements >= EXACT_ELEMENTS


def sums_exactly(declared: Field, reduction: Literal["ordered", "tree"], plain: bool) -> bool:
    """Whether an uploaded field is added exactly on each rank, so that one sum a rank is collected."""
    if reduction != "ordered" or isinstance(declared.reduce, Each):
        return False
    return added_exactly(declared, torch.Size(full_shape(declared, 0)).numel(), plain)


class Ways(NamedTuple):
    """The fields of an upload by the way in which they are collected, in order."""

    whole: list[str]  # gathered as they are
    exact: list[str]  # added exactly
    sliced: list[str]  # gathered slice by slice, the largest elements first
    single: list[str]  # added by MPI in float32
    double: list[str]  # and in float64


def ways(
    fields: Mapping[str, Field],
    reduction: Literal["ordered", "tree"],
    is_exact: Callable[[str], bool],
    is_plain: Callable[[str], bool],
) -> Ways:
    """The way of each field; by what is declared, so that every rank knows it, and a plan too."""
    found = Ways([], [], [], [], [])
    for name, declared in fields.items():
        if isinstance(declared.reduce, Each):
            found.whole.append(name)
        elif reduction == "tree":
            (found.single if declared.dtype == torch.float32 else found.double).append(name)
        elif is_exact(name):
            found.exact.append(name)
        elif is_plain(name):
            found.sliced.append(name)
        else:
            found.whole.append(name)
    found.sliced.sort(key=lambda name: -fields[name].dtype.itemsize)  # so that every element is aligned in a fused row
    return found


def sums_are_gathered(givers: int, route: Route) -> bool:
    """Whether rank 0 adds the exact sums of so many ranks itself; along a route they are added on the way."""
    return route == "library" and givers <= GATHERED_RANKS


def exact_slice(rows: int) -> int:
    """Elements of an exact sum that are added at a time, where rank 0 receives so many rows of them."""
    return max(1, SLICE_BYTES // 8 // max(1, rows))


def gathered_slice(replies: int) -> int:
    """Bytes of every reply's row that are gathered at a time."""
    return max(8, SLICE_BYTES // max(1, replies) // 8 * 8)


def factor_of(rule: Any, weight: float) -> float:
    """What a reply of that weight is multiplied by in a sum."""
    return weight if getattr(rule, "weights", "uniform") == "reply" else 1.0


def full_shape(declared: Field, length: int) -> tuple[int, ...]:
    """The declared shape with the length that only the sender knew."""
    return tuple(length if size is None else size for size in declared.shape)


def by_route(names: Iterable[str], route: Callable[[str], Route]) -> dict[Route, list[str]]:
    """Fields that share a message: those of each route, in the order in which a route is first seen."""
    found: dict[Route, list[str]] = {}
    for name in names:
        found.setdefault(route(name), []).append(name)
    return found


def fused(parts: Iterable[Tensor]) -> Tensor:
    """uint8 parts one after the other; a single one is not copied."""
    every = list(parts)
    return every[0] if len(every) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8), *every])


class Collection:
    """One phase's replies on their way; every rank makes one and calls `run`."""

    def __init__(
        self,
        comm: Communicator,
        codec: Callable[[str, str], Codec],
        device: torch.device,
        phase: str,
        fields: Mapping[str, Field],
        outgoing: Mapping[int, Outgoing],
        known: Announcement,
        dealt: Assignment,
        route: Callable[[str], Route] = lambda name: "library",
    ) -> None:
        self._comm = comm
        self._route = route
        self._codec = codec
        self._phase = phase
        self._fields = fields
        self._outgoing = outgoing
        self._known = known
        self._by_rank = [tuple(c for c in clients if c in known.weights) for clients in dealt.by_rank]
        self._here = self._by_rank[comm.rank]
        weights = torch.tensor([known.weights[client] for client in known.clients], dtype=torch.float64)
        self._received = Received(fields, known.clients, weights, device)

    def run(self, reduction: Literal["ordered", "tree"]) -> Received | None:
        """What rank 0 receives; None on the others."""
        plain = {name: self._codec("up", name).plain for name in self._fields}
        found = ways(self._fields, reduction, self._known.bounds.__contains__, plain.__getitem__)
        for route, names in by_route(found.whole, self._route).items():
            self._gather_whole(names, route)
        for name in found.exact:
            self._reduce_exactly(name, self._route(name))
        for route, names in by_route(found.sliced, self._route).items():
            self._gather_slices(names, route)
        for reduced, on_the_wire in ((found.single, torch.float32), (found.double, torch.float64)):
            for route, names in by_route(reduced, self._route).items():
                self._reduce(names, on_the_wire, route)
        return self._received if self._comm.rank == 0 else None

    def _gather_whole(self, names: Sequence[str], route: Route) -> None:
        nbytes = self._known.nbytes
        counts = [sum(nbytes[name][client] for client in clients for name in names) for clients in self._by_rank]

        def of_clients(clients: Iterable[int]) -> Kinds:
            return self._kinds({name: sum(nbytes[name][client] for client in clients) for name in names})

        send = fused(self._outgoing[client].data[name] for client in self._here for name in names)
        buffer = self._comm.gather(
            send.numpy(),
            counts,
            of_clients(self._here),
            of_clients(self._known.clients),
            route,
            lambda rank: of_clients(self._by_rank[rank]),
        )
        if buffer is None:
            return
        keys = [(name, client) for clients in self._by_rank for client in clients for name in names]
        parts = torch.from_numpy(buffer).split([nbytes[name][client] for name, client in keys])
        data = dict(zip(keys, parts, strict=True))
        for name in names:
            replies = (self._decode(name, client, data[name, client]) for client in self._known.clients)
            if isinstance(self._fields[name].reduce, Each):
                self._received.entries[name] = entries = list(replies)
                if entries and added_exactly(self._fields[name], entries[0].numel(), self._codec("up", name).plain):
                    self._received.exact.add(name)
            else:
                self._received.totals[name] = self._total(name, self._known.clients, replies)

    def _reduce_exactly(self, name: str, route: Route) -> None:
        """Each rank adds its own replies slice by slice; then the ranks' slices are added. Nothing is rounded again."""
        elements, limit = self._elements(name), self._known.bounds[name]
        values = [self._decode(name, client, self._outgoing[client].data[name]).view(-1) for client in self._here]
        factors = [self._factor(name, client) for client in self._here]
        total = torch.zeros(elements if self._comm.rank == 0 else 0, dtype=torch.float64)
        givers = sum(bool(clients) for clients in self._by_rank)
        few = sums_are_gathered(givers, route)
        step = exact_slice(givers if few else 1)
        for low in range(0, elements, step):
            high = min(low + step, elements)
            part = add_exactly([value[low:high] for value in values], factors, high - low, limit)
            summed = self._gathered_sum(name, part) if few else self._reduced_sum(name, part, route)
            if summed is not None:
                total[low:high] = summed
        self._received.totals[name] = total

    def _gathered_sum(self, name: str, part: Tensor) -> Tensor | None:
        """At rank 0, of the ranks that have replies."""
        counts = [part.nbytes if clients else 0 for clients in self._by_rank]
        send = part if self._here else part[:0]
        mine, everyone = self._kinds({name: send.nbytes}), self._kinds({name: sum(counts)})
        buffer = self._comm.gather(send.view(torch.uint8).numpy(), counts, mine, everyone)
        if buffer is None:
            return None
        first, *others = torch.from_numpy(buffer).view(part.dtype).view(-1, part.numel())
        for other in others:  # whole rows: `sum(0)` takes several times as long
            first.add_(other)
        return first

    def _reduced_sum(self, name: str, part: Tensor, route: Route) -> Tensor | None:
        """At rank 0, of all ranks."""
        gives = [bool(clients) for clients in self._by_rank]
        summed = self._comm.reduce(part.numpy(), self._kinds({name: part.nbytes}), route, gives)
        return None if summed is None else torch.from_numpy(summed)

    def _gather_slices(self, names: Sequence[str], route: Route) -> None:
        sizes = {name: self._elements(name) * self._fields[name].dtype.itemsize for name in names}
        for name in names if self._comm.rank == 0 else ():
            self._received.totals[name] = torch.zeros(self._elements(name), dtype=torch.float64)
        rows = [fused(self._outgoing[client].data[name] for name in names) for client in self._here]
        row_bytes = sum(sizes.values())
        step = gathered_slice(len(self._known.clients))
        for low in range(0, row_bytes, step):
            high = min(low + step, row_bytes)
            spans = list(_spans(names, sizes, low, high))
            counts = [(high - low) * len(clients) for clients in self._by_rank]
            # of all names, also those that this slice holds nothing of: all slices are one message to the wire's meter
            in_slice = dict.fromkeys(names, 0) | {name: end - begin for name, begin, end, _ in spans}
            of_ranks = [self._of_replies(in_slice, len(clients)) for clients in self._by_rank]
            everyone = self._of_replies(in_slice, len(self._known.clients))
            send = fused(row[low:high] for row in rows).numpy()
            buffer = self._comm.gather(send, counts, of_ranks[self._comm.rank], everyone, route, of_ranks.__getitem__)
            if buffer is not None:
                self._add_slice(torch.from_numpy(buffer).view(-1, high - low), spans)

    def _of_replies(self, sizes: Mapping[str, int], replies: int) -> Kinds:
        return self._kinds({name: size * replies for name, size in sizes.items()})

    def _add_slice(self, rows: Tensor, spans: Sequence[tuple[str, int, int, int]]) -> None:
        """Add a slice of every reply, `rows` being in rank order, to the totals, in the order of client ids."""
        row_of = {client: row for row, client in enumerate(c for clients in self._by_rank for c in clients)}
        for name, begin, end, start in spans:
            dtype = self._fields[name].dtype
            first, count = start // dtype.itemsize, (end - begin) // dtype.itemsize
            target = self._received.totals[name][first : first + count]
            parts = [rows[row_of[client], begin:end] for client in self._known.clients]
            parts = [part.clone() if part.storage_offset() % dtype.itemsize else part for part in parts]
            factors = [self._factor(name, client) for client in self._known.clients]
            add_in_order(target, [part.view(dtype) for part in parts], factors)

    def _reduce(self, names: Sequence[str], on_the_wire: torch.dtype, route: Route) -> None:
        totals = {}
        for name in names:
            replies = (self._decode(name, client, self._outgoing[client].data[name]) for client in self._here)
            totals[name] = self._total(name, self._here, replies).to(on_the_wire)
        kinds = self._kinds({name: total.nbytes for name, total in totals.items()})
        vector = torch.cat(list(totals.values())) if len(totals) > 1 else totals[names[0]]
        summed = self._comm.reduce(vector.numpy(), kinds, route)
        if summed is not None:
            parts = torch.from_numpy(summed).split([total.numel() for total in totals.values()])
            for name, part in zip(names, parts, strict=True):
                self._received.totals[name] = part.to(torch.float64)

    # --- one field ---------------------------------------------------------------------------------------------------
    def _decode(self, name: str, client: int, data: Tensor) -> Tensor:
        declared = self._fields[name]
        shape = full_shape(declared, self._known.lengths[name][client])
        return self._codec("up", name).decode(data, shape, declared.dtype, declared.layout)

    def _total(self, name: str, clients: Iterable[int], values: Iterable[Tensor]) -> Tensor:
        total = torch.zeros(self._elements(name), dtype=torch.float64)
        for client, value in zip(clients, values, strict=True):
            add_in_order(total, [value], [self._factor(name, client)])
        return total

    def _factor(self, name: str, client: int) -> float:
        return factor_of(self._fields[name].reduce, self._known.weights[client])

    def _elements(self, name: str) -> int:
        return torch.Size(full_shape(self._fields[name], 0)).numel()

    def _kinds(self, sizes: Mapping[str, int]) -> Kinds:
        return {label(self._phase, "up", name): size for name, size in sizes.items()}


def _spans(names: Sequence[str], sizes: Mapping[str, int], low: int, high: int) -> Iterator[tuple[str, int, int, int]]:
    """The fields in the bytes `[low, high)` of a fused row: name, begin and end in the slice, begin in the field."""
    start = 0
    for name in names:
        begin, end = max(low, start), min(high, start + sizes[name])
        if begin < end:
            yield name, begin - low, end - low, begin - start
        start += sizes[name]
