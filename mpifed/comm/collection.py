"""Bringing the replies of a phase to rank 0, each field in the way that it asks for, all fields of one way together.

- `Each` fields, and encoded fields of an ordered reduction: one gather.
- `Sum` and `Mean`, `reduce = "ordered"`: gathered slice by slice and added in the order of client ids in float64, so
  that the result is the same bit for bit on any number of ranks, and rank 0 holds `SLICE_BYTES`, never every model.
- `Sum` and `Mean`, `reduce = "tree"`: added in float64 on each rank, then by MPI in float32 (float64 for integers and
  float64): rank 0 receives one vector, however many clients answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mpifed.algorithms.base import Each, Field, Mean
from mpifed.codecs import Codec
from mpifed.comm.communicator import Communicator, Kinds
from mpifed.comm.ledger import label
from mpifed.federation.roster import Assignment
from mpifed.types import State

SLICE_BYTES = 16 << 20
"""Most bytes that rank 0 receives at a time in an ordered reduction."""

_BLOCK = 1 << 15
"""Elements of a sum that are worked on at a time, so that they stay in the cache from one reply to the next."""

Sizes = dict[tuple[str, str], dict[int, int]]
"""Logical bytes by (direction, kind) and client."""


@dataclass
class Outgoing:
    """One client's encoded reply on its rank, waiting to be collected."""

    weight: float
    data: dict[str, Tensor]  # uint8, one axis
    lengths: dict[str, int]  # of the axis that is None in the declared shape
    memory: dict[str, State]  # the codecs' next memory


@dataclass(frozen=True)
class Announcement:
    """What every rank knows of a phase's replies before they are collected."""

    clients: tuple[int, ...]  # those that answered, ascending
    weights: dict[int, float]
    nbytes: dict[str, dict[int, int]]  # by field and client
    lengths: dict[str, dict[int, int]]
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

    def mean(self, name: str) -> Tensor:
        rule = self.fields[name].reduce
        if not isinstance(rule, Mean | Each):
            raise TypeError(f"upload '{name}' is declared as {rule}, so it has no mean")
        if isinstance(rule, Each):
            total = self._added(name, [_factor(rule, float(weight)) for weight in self.weights])
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

    def _added(self, name: str, factors: Iterable[float]) -> Tensor:
        total = torch.zeros(self.entries[name][0].numel(), dtype=torch.float64)
        _add(total, self.entries[name], factors)
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


def _add(total: Tensor, values: Iterable[Tensor], factors: Iterable[float]) -> None:
    """`total += factor * value` for one value after another, in float64 and rounded twice everywhere.

    A fused multiply-add, which rounds once, would be used or not depending on where a slice begins.
    """
    pairs = [(value.reshape(-1), factor) for value, factor in zip(values, factors, strict=True)]
    for start in range(0, total.numel(), _BLOCK):
        block = total[start : start + _BLOCK]
        for value, factor in pairs:
            # not in place: a float64 value is the reply itself
            block.add_(value[start : start + _BLOCK].to(torch.float64) * factor)


def _factor(rule: Any, weight: float) -> float:
    return weight if getattr(rule, "weights", "uniform") == "reply" else 1.0


def full_shape(declared: Field, length: int) -> tuple[int, ...]:
    """The declared shape with the length that only the sender knew."""
    return tuple(length if size is None else size for size in declared.shape)


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
    ) -> None:
        self._comm = comm
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
        whole, sliced, reduced = [], [], []
        for name, declared in self._fields.items():
            if isinstance(declared.reduce, Each):
                whole.append(name)
            elif reduction == "tree":
                reduced.append(name)
            elif self._codec("up", name).plain:
                sliced.append(name)
            else:
                whole.append(name)
        if whole:
            self._gather_whole(whole)
        if sliced:  # the largest elements first, so that every element is aligned in the fused row
            self._gather_slices(sorted(sliced, key=lambda name: -self._fields[name].dtype.itemsize))
        for on_the_wire in (torch.float32, torch.float64):
            group = [n for n in reduced if (self._fields[n].dtype == torch.float32) == (on_the_wire == torch.float32)]
            if group:
                self._reduce(group, on_the_wire)
        return self._received if self._comm.rank == 0 else None

    def _gather_whole(self, names: Sequence[str]) -> None:
        nbytes = self._known.nbytes
        counts = [sum(nbytes[name][client] for client in clients for name in names) for clients in self._by_rank]
        mine = self._kinds({name: sum(nbytes[name][client] for client in self._here) for name in names})
        everyone = self._kinds({name: sum(nbytes[name].values()) for name in names})
        send = fused(self._outgoing[client].data[name] for client in self._here for name in names)
        buffer = self._comm.gather(send.numpy(), counts, mine, everyone)
        if buffer is None:
            return
        keys = [(name, client) for clients in self._by_rank for client in clients for name in names]
        parts = torch.from_numpy(buffer).split([nbytes[name][client] for name, client in keys])
        data = dict(zip(keys, parts, strict=True))
        for name in names:
            replies = (self._decode(name, client, data[name, client]) for client in self._known.clients)
            if isinstance(self._fields[name].reduce, Each):
                self._received.entries[name] = list(replies)
            else:
                self._received.totals[name] = self._total(name, self._known.clients, replies)

    def _gather_slices(self, names: Sequence[str]) -> None:
        sizes = {name: self._elements(name) * self._fields[name].dtype.itemsize for name in names}
        for name in names if self._comm.rank == 0 else ():
            self._received.totals[name] = torch.zeros(self._elements(name), dtype=torch.float64)
        rows = [fused(self._outgoing[client].data[name] for name in names) for client in self._here]
        row_bytes = sum(sizes.values())
        step = max(8, SLICE_BYTES // max(1, len(self._known.clients)) // 8 * 8)
        for low in range(0, row_bytes, step):
            high = min(low + step, row_bytes)
            spans = list(_spans(names, sizes, low, high))
            mine = self._kinds({name: (end - begin) * len(self._here) for name, begin, end, _ in spans})
            everyone = self._kinds({n: (end - begin) * len(self._known.clients) for n, begin, end, _ in spans})
            counts = [(high - low) * len(clients) for clients in self._by_rank]
            buffer = self._comm.gather(fused(row[low:high] for row in rows).numpy(), counts, mine, everyone)
            if buffer is not None:
                self._add_slice(torch.from_numpy(buffer).view(-1, high - low), spans)

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
            _add(target, [part.view(dtype) for part in parts], factors)

    def _reduce(self, names: Sequence[str], on_the_wire: torch.dtype) -> None:
        totals = {}
        for name in names:
            replies = (self._decode(name, client, self._outgoing[client].data[name]) for client in self._here)
            totals[name] = self._total(name, self._here, replies).to(on_the_wire)
        kinds = self._kinds({name: total.nbytes for name, total in totals.items()})
        vector = torch.cat(list(totals.values())) if len(totals) > 1 else totals[names[0]]
        summed = self._comm.reduce(vector.numpy(), kinds)
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
            _add(total, [value], [self._factor(name, client)])
        return total

    def _factor(self, name: str, client: int) -> float:
        return _factor(self._fields[name].reduce, self._known.weights[client])

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
