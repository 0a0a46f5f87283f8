"""The exchange: payloads to buffers, buffers to collectives, and back; the same collectives on every rank.

A download is one broadcast of all shared fields, and one scatter where every client gets its own. An upload is
announced first (one small sum over the ranks tells every rank every reply's status, weight and sizes), and then
collected, all fields of one way of reduction in one fused buffer:

- `Each` fields, and encoded fields of an ordered reduction: one gather.
- `Sum` and `Mean`, `reduce = "ordered"`: gathered slice by slice and added in the order of client ids in float64, so
  that the result is the same bit for bit on any number of ranks, and rank 0 holds `SLICE_BYTES`, never every model.
- `Sum` and `Mean`, `reduce = "tree"`: added in float64 on each rank, then by MPI in float32 (float64 for integers and
  float64): rank 0 receives one vector, however many clients answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mpifed.algorithms.base import Each, Field, Mean, Reply
from mpifed.codecs import Codec
from mpifed.comm.communicator import CONTROL, Communicator
from mpifed.comm.ledger import WEIGHT, label
from mpifed.federation.roster import Assignment
from mpifed.types import Payload, State

SLICE_BYTES = 64 << 20
"""Most bytes that rank 0 receives at a time in an ordered reduction."""

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
        for value, factor in zip(self.entries[name], factors, strict=True):
            _add(total, value.reshape(-1), factor)
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


def _add(total: Tensor, value: Tensor, factor: float) -> None:
    """`total += factor * value` in float64, rounded twice everywhere.

    A fused multiply-add, which rounds once, would be used or not depending on where a slice begins.
    """
    total.add_(value.to(torch.float64) * factor)  # not in place: a float64 value is the reply itself


def _factor(rule: Any, weight: float) -> float:
    return weight if getattr(rule, "weights", "uniform") == "reply" else 1.0


def _shape(declared: Field, length: int) -> tuple[int, ...]:
    return tuple(length if size is None else size for size in declared.shape)


def _unknown_length(declared: Field, value: Tensor, name: str) -> int:
    """Checks a payload's tensor against its declaration; the length of the axis that is None (0 without one)."""
    fits = value.dtype == declared.dtype and value.dim() == len(declared.shape)
    if not fits or any(size not in (None, actual) for size, actual in zip(declared.shape, value.shape, strict=True)):
        raise ValueError(
            f"'{name}' is declared as {declared.dtype} {declared.shape}, but is {value.dtype} {tuple(value.shape)}"
        )
    return next((a for size, a in zip(declared.shape, value.shape, strict=True) if size is None), 0)


class Exchange:
    """Carries the payloads of a run. `codec(direction, name)` is the codec of a field."""

    def __init__(
        self,
        comm: Communicator,
        codec: Callable[[str, str], Codec],
        reduction: Literal["ordered", "tree"],
        device: torch.device,
    ) -> None:
        self._comm = comm
        self._codec = codec
        self._reduction = reduction
        self._device = device

    # --- download -----------------------------------------------------------------------------------------------------
    def download(
        self,
        phase: str,
        fields: Mapping[str, Field],
        payload: Payload | None,
        dealt: Assignment,
        everybody: int,
        progress: float,
    ) -> tuple[Payload, dict[int, Payload], Sizes]:
        """Send rank 0's payload: the shared fields, the own fields of this rank's clients, and logical bytes."""
        comm, root = self._comm, self._comm.rank == 0
        shared = {name: declared for name, declared in fields.items() if declared.to != "each"}
        own = {name: declared for name, declared in fields.items() if declared.to == "each"}
        if root:
            payload = {} if payload is None else payload
            if set(payload) != set(fields):
                raise ValueError(
                    f"the download of phase '{phase}' holds {sorted(payload)}, declared are {sorted(fields)}"
                )
        encoded: dict[str, Tensor] = {}
        rows: dict[tuple[str, int], Tensor] = {}
        heads = np.zeros((len(shared), 2), np.int64)
        row_sizes = np.zeros((len(own), len(dealt.clients), 2), np.int64)
        if root and payload is not None:
            for i, (name, declared) in enumerate(shared.items()):
                value = payload[name].detach().cpu()
                length = _unknown_length(declared, value, name)
                encoded[name], _ = self._codec("down", name).encode(value, declared.layout, {}, progress)
                heads[i] = encoded[name].numel(), length
            for i, (name, declared) in enumerate(own.items()):
                values = payload[name].detach().cpu()
                if len(values) != len(dealt.clients):
                    raise ValueError(f"'{name}' has {len(values)} rows for {len(dealt.clients)} clients")
                for j, client in enumerate(dealt.clients):
                    length = _unknown_length(declared, values[j], name)
                    data, _ = self._codec("down", name).encode(values[j], declared.layout, {}, progress)
                    rows[name, client] = data
                    row_sizes[i, j] = data.numel(), length
        header = np.concatenate([heads.reshape(-1), row_sizes.reshape(-1)])
        if header.size:
            comm.broadcast(header, {CONTROL: header.nbytes})
        heads, row_sizes = header[: heads.size].reshape(heads.shape), header[heads.size :].reshape(row_sizes.shape)

        sizes: Sizes = {}
        result: Payload = {}
        if shared:
            kinds = {label(phase, "down", name): int(heads[i, 0]) for i, name in enumerate(shared)}
            buffer = self._fused([encoded[name] for name in shared] if root else None, int(heads[:, 0].sum()))
            comm.broadcast(buffer.numpy(), kinds)
            start = 0
            for i, (name, declared) in enumerate(shared.items()):
                size, length = int(heads[i, 0]), int(heads[i, 1])
                data = buffer[start : start + size]
                start += size
                value = self._codec("down", name).decode(
                    data, _shape(declared, length), declared.dtype, declared.layout
                )
                result[name] = value.to(self._device)
                receivers = range(everybody) if declared.to == "everybody" else dealt.clients
                sizes["down", name] = dict.fromkeys(receivers, size)
        mine: dict[int, Payload] = {client: {} for client in dealt.by_rank[comm.rank]}
        if own:
            self._scatter(phase, own, rows, row_sizes, dealt, mine, sizes)
        return result, mine, sizes

    def _scatter(
        self,
        phase: str,
        own: Mapping[str, Field],
        rows: Mapping[tuple[str, int], Tensor],
        row_sizes: np.ndarray[Any, Any],
        dealt: Assignment,
        mine: dict[int, Payload],
        sizes: Sizes,
    ) -> None:
        comm = self._comm
        place = {client: j for j, client in enumerate(dealt.clients)}
        size_of = {(n, c): int(row_sizes[i, j, 0]) for i, n in enumerate(own) for c, j in place.items()}
        order = [(name, client) for clients in dealt.by_rank for client in clients for name in own]
        counts = [sum(size_of[name, c] for c in clients for name in own) for clients in dealt.by_rank]
        here = dealt.by_rank[comm.rank]
        kinds = {label(phase, "down", name): sum(size_of[name, client] for client in here) for name in own}
        sent = {label(phase, "down", name): sum(size_of[name, client] for client in dealt.clients) for name in own}
        send = self._fused([rows[key] for key in order], sum(counts)).numpy() if comm.rank == 0 else None
        buffer = torch.from_numpy(comm.scatter(send, counts, kinds, sent))
        start = 0
        for client in here:
            for i, (name, declared) in enumerate(own.items()):
                size, length = (int(number) for number in row_sizes[i, place[client]])
                data = buffer[start : start + size]
                start += size
                shape = _shape(declared, length)
                value = self._codec("down", name).decode(data, shape, declared.dtype, declared.layout)
                mine[client][name] = value.to(self._device)
        for name in own:
            sizes["down", name] = {client: size_of[name, client] for client in dealt.clients}

    @staticmethod
    def _fused(parts: Sequence[Tensor] | None, size: int) -> Tensor:
        if parts is None:
            return torch.empty(size, dtype=torch.uint8)
        return parts[0] if len(parts) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8), *parts])

    # --- upload -------------------------------------------------------------------------------------------------------
    def encode(
        self, fields: Mapping[str, Field], reply: Reply, memory: Mapping[str, State], progress: float
    ) -> Outgoing:
        """A client's reply as bytes. Raises ValueError where it does not fit its declaration or is not finite."""
        if set(reply.upload) != set(fields):
            raise ValueError(f"the upload holds {sorted(reply.upload)}, declared are {sorted(fields)}")
        if not np.isfinite(reply.weight) or reply.weight < 0:
            raise ValueError(f"the weight of the reply is {reply.weight}")
        outgoing = Outgoing(float(reply.weight), {}, {}, {})
        for name, declared in fields.items():
            value = reply.upload[name].detach().cpu()
            outgoing.lengths[name] = _unknown_length(declared, value, name)
            if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
                raise ValueError(f"non-finite {name}")
            data, kept = self._codec("up", name).encode(value, declared.layout, memory.get(name, {}), progress)
            outgoing.data[name] = data
            if kept:
                outgoing.memory[name] = kept
        return outgoing

    def announce(
        self, fields: Mapping[str, Field], outgoing: Mapping[int, Outgoing], dealt: Assignment
    ) -> Announcement:
        """One sum over the ranks: who answered, with which weight, and how many bytes."""
        table = np.zeros((len(dealt.clients), 2 + 2 * len(fields)), np.float64)
        place = {client: row for row, client in enumerate(dealt.clients)}
        for client, reply in outgoing.items():
            numbers = [number for name in fields for number in (reply.data[name].numel(), reply.lengths[name])]
            table[place[client]] = [1.0, reply.weight, *numbers]
        table = self._comm.sum_everywhere(table.reshape(-1)).reshape(table.shape)
        clients = tuple(client for client in dealt.clients if table[place[client], 0] > 0)

        def column(index: int) -> dict[int, int]:
            return {client: int(table[place[client], index]) for client in clients}

        nbytes = {name: column(2 + 2 * i) for i, name in enumerate(fields)}
        lengths = {name: column(3 + 2 * i) for i, name in enumerate(fields)}
        weights = {client: float(table[place[client], 1]) for client in clients}
        logical: Sizes = {("up", name): nbytes[name] for name in fields}
        if any(
            isinstance(declared.reduce, Mean) and declared.reduce.weights == "reply" for declared in fields.values()
        ):
            logical["up", WEIGHT] = dict.fromkeys(clients, 8)
        return Announcement(clients, weights, nbytes, lengths, logical)

    def collect(
        self,
        phase: str,
        fields: Mapping[str, Field],
        outgoing: Mapping[int, Outgoing],
        known: Announcement,
        dealt: Assignment,
    ) -> Received | None:
        """Bring the announced replies to rank 0; the others get None."""
        weights = torch.tensor([known.weights[client] for client in known.clients], dtype=torch.float64)
        received = Received(fields, known.clients, weights, self._device)
        by_rank = [tuple(c for c in clients if c in known.weights) for clients in dealt.by_rank]
        whole, sliced, reduced = self._ways(fields)
        if whole:
            self._gather_whole(phase, fields, whole, outgoing, known, by_rank, received)
        if sliced:
            self._gather_slices(phase, fields, sliced, outgoing, known, by_rank, received)
        if reduced:
            self._reduce(phase, fields, reduced, outgoing, known, by_rank, received)
        return received if self._comm.rank == 0 else None

    def _ways(self, fields: Mapping[str, Field]) -> tuple[list[str], list[str], list[str]]:
        """Field names by how they travel: gathered whole, gathered in slices, reduced by MPI."""
        whole, sliced, reduced = [], [], []
        for name, declared in fields.items():
            if isinstance(declared.reduce, Each):
                whole.append(name)
            elif self._reduction == "tree":
                reduced.append(name)
            elif self._codec("up", name).plain:
                sliced.append(name)
            else:
                whole.append(name)
        sliced.sort(key=lambda name: -fields[name].dtype.itemsize)  # so that every element is aligned in the fused row
        return whole, sliced, reduced

    def _gather_whole(
        self,
        phase: str,
        fields: Mapping[str, Field],
        names: Sequence[str],
        outgoing: Mapping[int, Outgoing],
        known: Announcement,
        by_rank: Sequence[tuple[int, ...]],
        received: Received,
    ) -> None:
        here = by_rank[self._comm.rank]
        counts = [sum(known.nbytes[name][client] for client in clients for name in names) for clients in by_rank]
        kinds = {label(phase, "up", name): sum(known.nbytes[name][c] for c in here) for name in names}
        total = {label(phase, "up", name): sum(known.nbytes[name].values()) for name in names}
        send = self._fused([outgoing[client].data[name] for client in here for name in names] or None, 0)
        buffer = self._comm.gather(send.numpy(), counts, kinds, total)
        if buffer is None:
            return
        data, start = torch.from_numpy(buffer), 0
        parts: dict[tuple[str, int], Tensor] = {}
        for clients in by_rank:
            for client in clients:
                for name in names:
                    parts[name, client] = data[start : start + known.nbytes[name][client]]
                    start += known.nbytes[name][client]
        for name in names:
            declared, codec = fields[name], self._codec("up", name)
            decoded = (
                codec.decode(
                    parts[name, client],
                    _shape(declared, known.lengths[name][client]),
                    declared.dtype,
                    declared.layout,
                )
                for client in known.clients
            )
            if isinstance(declared.reduce, Each):
                received.entries[name] = list(decoded)
                continue
            for client, value in zip(known.clients, decoded, strict=True):
                if name not in received.totals:
                    received.totals[name] = torch.zeros(value.numel(), dtype=torch.float64)
                _add(received.totals[name], value.reshape(-1), _factor(declared.reduce, known.weights[client]))

    def _gather_slices(
        self,
        phase: str,
        fields: Mapping[str, Field],
        names: Sequence[str],
        outgoing: Mapping[int, Outgoing],
        known: Announcement,
        by_rank: Sequence[tuple[int, ...]],
        received: Received,
    ) -> None:
        comm = self._comm
        here = by_rank[comm.rank]
        mine = [self._fused([outgoing[client].data[name] for name in names], 0) for client in here]
        sizes = {name: int(torch.Size(_shape(fields[name], 0)).numel()) * fields[name].dtype.itemsize for name in names}
        row_bytes = sum(sizes.values())
        step = max(8, SLICE_BYTES // max(1, len(known.clients)) // 8 * 8)
        if comm.rank == 0:
            received.totals.update(
                {n: torch.zeros(sizes[n] // fields[n].dtype.itemsize, dtype=torch.float64) for n in names}
            )
        for low in range(0, row_bytes, step):
            high = min(low + step, row_bytes)
            width = high - low
            spans, start = [], 0
            for name in names:  # the parts of the fields in this slice: name, [begin, end) in the slice, first element
                begin, end = max(low, start), min(high, start + sizes[name])
                if begin < end:
                    spans.append((name, begin - low, end - low, (begin - start) // fields[name].dtype.itemsize))
                start += sizes[name]
            kinds = {label(phase, "up", name): (end - begin) * len(here) for name, begin, end, _ in spans}
            total = {label(phase, "up", name): (end - begin) * len(known.clients) for name, begin, end, _ in spans}
            send = self._fused([row[low:high] for row in mine] or None, 0)
            buffer = comm.gather(send.numpy(), [width * len(clients) for clients in by_rank], kinds, total)
            if buffer is None:
                continue
            rows = torch.from_numpy(buffer).view(-1, width)
            row_of = {client: row for row, client in enumerate(c for clients in by_rank for c in clients)}
            for name, begin, end, first in spans:
                declared = fields[name]
                count = (end - begin) // declared.dtype.itemsize
                target = received.totals[name][first : first + count]
                for client in known.clients:
                    part = rows[row_of[client], begin:end]
                    part = part.clone() if (part.storage_offset() % declared.dtype.itemsize) else part
                    _add(target, part.view(declared.dtype), _factor(declared.reduce, known.weights[client]))

    def _reduce(
        self,
        phase: str,
        fields: Mapping[str, Field],
        names: Sequence[str],
        outgoing: Mapping[int, Outgoing],
        known: Announcement,
        by_rank: Sequence[tuple[int, ...]],
        received: Received,
    ) -> None:
        here = by_rank[self._comm.rank]
        for on_the_wire in (torch.float32, torch.float64):
            group = [name for name in names if (fields[name].dtype == torch.float32) == (on_the_wire == torch.float32)]
            if not group:
                continue
            totals = []
            for name in group:
                declared, codec = fields[name], self._codec("up", name)
                shape = _shape(declared, 0)
                total = torch.zeros(int(torch.Size(shape).numel()), dtype=torch.float64)
                for client in here:
                    value = codec.decode(outgoing[client].data[name], shape, declared.dtype, declared.layout)
                    _add(total, value.reshape(-1), _factor(declared.reduce, known.weights[client]))
                totals.append(total.to(on_the_wire))
            kinds = {label(phase, "up", n): t.nbytes for n, t in zip(group, totals, strict=True)}
            summed = self._comm.reduce((totals[0] if len(totals) == 1 else torch.cat(totals)).numpy(), kinds)
            if summed is not None:
                parts = torch.from_numpy(summed).split([total.numel() for total in totals])
                received.totals.update({n: part.to(torch.float64) for n, part in zip(group, parts, strict=True)})
