"""The exchange: payloads to buffers, buffers to collectives, and back; the same collectives on every rank.

A download is one broadcast of all shared fields, and one scatter where every client gets its own (of each route, where
the job names several); before it come the sizes, where the declarations do not decide them. An upload is announced
first (one small sum over the ranks tells every rank every reply's status, weight and sizes), and then collected
(`mpifed.comm.collection`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mpifed.algorithms.base import Field, Reply, takes_weights
from mpifed.codecs import Codec
from mpifed.comm.collection import (
    Announcement,
    Collection,
    Outgoing,
    Received,
    Sizes,
    by_route,
    factor_of,
    full_shape,
    fused,
    sums_exactly,
)
from mpifed.comm.communicator import CONTROL, Communicator
from mpifed.comm.ledger import WEIGHT, label
from mpifed.comm.routes import Route
from mpifed.comm.summation import bound, peak
from mpifed.federation.roster import Assignment
from mpifed.rng import derive
from mpifed.types import Payload, State


def _unknown_length(declared: Field, value: Tensor, name: str) -> int:
    """Checks a payload's tensor against its declaration; the length of the axis that is None (0 without one)."""
    fits = value.dtype == declared.dtype and value.dim() == len(declared.shape)
    if not fits or any(size not in (None, actual) for size, actual in zip(declared.shape, value.shape, strict=True)):
        raise ValueError(
            f"'{name}' is declared as {declared.dtype} {declared.shape}, but is {value.dtype} {tuple(value.shape)}"
        )
    return next((a for size, a in zip(declared.shape, value.shape, strict=True) if size is None), 0)


class Exchange:
    """Carries the payloads of a run. `codec(direction, name)` is the codec of a field, `route(direction, name)` its
    route; fields of one route share a message."""

    def __init__(
        self,
        comm: Communicator,
        codec: Callable[[str, str], Codec],
        reduction: Literal["ordered", "tree"],
        device: torch.device,
        route: Callable[[str, str], Route] = lambda direction, name: "library",
    ) -> None:
        self._comm = comm
        self._codec = codec
        self._route = route
        self._reduction = reduction
        self._device = device
        self.memory: State = {}
        """At rank 0: what codecs of downloads remember, by phase, field and, where each client has its own, client."""

    # --- download -----------------------------------------------------------------------------------------------------
    def download(
        self,
        phase: str,
        fields: Mapping[str, Field],
        payload: Payload | None,
        dealt: Assignment,
        everybody: int,
        progress: float,
        seed: int = 0,
    ) -> tuple[Payload, dict[int, Payload], Sizes]:
        """Send rank 0's payload: the shared fields, the own fields of this rank's clients, and logical bytes.

        `progress` (round/rounds) and `seed` are for codecs.
        """
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
                encoded[name] = self._encoded_down(phase, (name,), value, declared, progress, seed)
                heads[i] = encoded[name].numel(), length
            for i, (name, declared) in enumerate(own.items()):
                values = payload[name].detach().cpu()
                if len(values) == everybody:
                    values = values[list(dealt.clients)]
                if len(values) != len(dealt.clients):
                    raise ValueError(f"'{name}' has {len(values)} rows for {len(dealt.clients)} clients")
                for j, client in enumerate(dealt.clients):
                    length = _unknown_length(declared, values[j], name)
                    data = self._encoded_down(phase, (name, str(client)), values[j], declared, progress, seed)
                    rows[name, client] = data
                    row_sizes[i, j] = data.numel(), length
        declared_sizes = self._declared_sizes("down", fields)
        if declared_sizes is not None:  # every rank knows them, so they need not be said
            heads[:, 0] = [declared_sizes[name] for name in shared]
            row_sizes[:, :, 0] = np.array([declared_sizes[name] for name in own], np.int64).reshape(-1, 1)
            for name, data in (*encoded.items(), *((name, row) for (name, _), row in rows.items())):
                if data.numel() != declared_sizes[name]:
                    raise ValueError(f"the codec of '{name}' made {data.numel()} bytes, not {declared_sizes[name]}")
        else:
            header = np.concatenate([heads.reshape(-1), row_sizes.reshape(-1)])
            comm.broadcast(header, {CONTROL: header.nbytes})
            heads, row_sizes = header[: heads.size].reshape(heads.shape), header[heads.size :].reshape(row_sizes.shape)

        size_of = {name: int(heads[i, 0]) for i, name in enumerate(shared)}
        arrived: dict[str, Tensor] = {}
        for route, names in by_route(shared, partial(self._route, "down")).items():
            size = sum(size_of[name] for name in names)
            buffer = fused(encoded[name] for name in names) if root else torch.empty(size, dtype=torch.uint8)
            comm.broadcast(buffer.numpy(), {label(phase, "down", name): size_of[name] for name in names}, route)
            arrived |= zip(names, buffer.split([size_of[name] for name in names]), strict=True)
        sizes: Sizes = {}
        result: Payload = {}
        for i, (name, declared) in enumerate(shared.items()):
            value = self._codec("down", name).decode(
                arrived[name], full_shape(declared, int(heads[i, 1])), declared.dtype, declared.layout
            )
            result[name] = value.to(self._device)
            receivers = range(everybody) if declared.to == "everybody" else dealt.clients
            sizes["down", name] = dict.fromkeys(receivers, size_of[name])
        mine: dict[int, Payload] = {client: {} for client in dealt.by_rank[comm.rank]}
        lengths = {(name, c): row_sizes[i, j] for i, name in enumerate(own) for j, c in enumerate(dealt.clients)}
        for route, names in by_route(own, partial(self._route, "down")).items():
            self._scatter(phase, {name: own[name] for name in names}, rows, lengths, dealt, mine, sizes, route)
        return result, {client: {name: mine[client][name] for name in own} for client in mine}, sizes

    def _declared_sizes(self, direction: str, fields: Mapping[str, Field]) -> dict[str, int] | None:
        """Encoded bytes of every field, where the declarations decide all of them."""
        sizes: dict[str, int] = {}
        for name, declared in fields.items():
            if None in declared.shape:
                return None
            size = self._codec(direction, name).nbytes(full_shape(declared, 0), declared.dtype, declared.layout)
            if size is None:
                return None
            sizes[name] = size
        return sizes

    def _encoded_down(
        self, phase: str, key: tuple[str, ...], value: Tensor, declared: Field, progress: float, seed: int
    ) -> Tensor:
        """A download's bytes; `key` is its field and, where it has one, its client."""
        path, memory = (phase, *key), self.memory
        for part in path[:-1]:
            memory = memory.get(part, {})
        codec, own_seed = self._codec("down", key[0]), derive(seed, "down", *key)
        data, kept = codec.encode(value, declared.layout, memory.get(path[-1], {}), progress, own_seed)
        if kept:
            memory = self.memory
            for part in path[:-1]:
                memory = memory.setdefault(part, {})
            memory[path[-1]] = kept
        return data

    def _scatter(
        self,
        phase: str,
        own: Mapping[str, Field],
        rows: Mapping[tuple[str, int], Tensor],
        row_sizes: Mapping[tuple[str, int], np.ndarray[Any, Any]],
        dealt: Assignment,
        mine: dict[int, Payload],
        sizes: Sizes,
        route: Route,
    ) -> None:
        """`row_sizes` by field and client: bytes, and the length that the declaration leaves open."""
        comm = self._comm
        size_of = {(name, client): int(row_sizes[name, client][0]) for name in own for client in dealt.clients}
        order = [(name, client) for clients in dealt.by_rank for client in clients for name in own]
        counts = [sum(size_of[name, c] for c in clients for name in own) for clients in dealt.by_rank]
        here = dealt.by_rank[comm.rank]

        def kinds_for(clients: Sequence[int]) -> dict[str, int]:
            return {label(phase, "down", name): sum(size_of[name, client] for client in clients) for name in own}

        send = fused(rows[key] for key in order).numpy() if comm.rank == 0 else None
        dealt_out = comm.scatter(
            send, counts, kinds_for(here), kinds_for(dealt.clients), route, lambda rank: kinds_for(dealt.by_rank[rank])
        )
        buffer = torch.from_numpy(dealt_out)
        start = 0
        for client in here:
            for name, declared in own.items():
                size, length = (int(number) for number in row_sizes[name, client])
                data = buffer[start : start + size]
                start += size
                shape = full_shape(declared, length)
                value = self._codec("down", name).decode(data, shape, declared.dtype, declared.layout)
                mine[client][name] = value.to(self._device)
        for name in own:
            sizes["down", name] = {client: size_of[name, client] for client in dealt.clients}

    # --- upload -------------------------------------------------------------------------------------------------------
    def encode(
        self, fields: Mapping[str, Field], reply: Reply, memory: Mapping[str, State], progress: float, seed: int = 0
    ) -> Outgoing:
        """A client's reply as bytes. Raises ValueError where it does not fit its declaration or is not finite.

        `memory` is what the codecs remember of this client; `progress` and `seed` are for them too.
        """
        if set(reply.upload) != set(fields):
            raise ValueError(f"the upload holds {sorted(reply.upload)}, declared are {sorted(fields)}")
        if not np.isfinite(reply.weight) or reply.weight < 0:
            raise ValueError(f"the weight of the reply is {reply.weight}")
        # what other phases' codecs remember stays
        outgoing = Outgoing(float(reply.weight), {}, {}, {n: kept for n, kept in memory.items() if n not in fields})
        for name, declared in fields.items():
            value = reply.upload[name].detach().cpu()
            outgoing.lengths[name] = _unknown_length(declared, value, name)
            if value.dtype.is_floating_point:
                outgoing.peaks[name] = peak(value)
                if not math.isfinite(outgoing.peaks[name]):
                    raise ValueError(f"non-finite {name}")
            codec, own_seed = self._codec("up", name), derive(seed, "up", name)
            data, kept = codec.encode(value, declared.layout, memory.get(name, {}), progress, own_seed)
            outgoing.data[name] = data
            if kept:
                outgoing.memory[name] = kept
        return outgoing

    def lossy(self, fields: Mapping[str, Field]) -> bool:
        """Whether some codec of these uploaded fields may change what it carries."""
        return not all(self._codec("up", name).plain for name in fields)

    def decoded(self, fields: Mapping[str, Field], outgoing: Outgoing) -> Payload:
        """A client's encoded reply as the server will decode it, on the device."""
        result: Payload = {}
        for name, declared in fields.items():
            shape = full_shape(declared, outgoing.lengths[name])
            value = self._codec("up", name).decode(outgoing.data[name], shape, declared.dtype, declared.layout)
            result[name] = value.to(self._device)
        return result

    def announce(
        self, fields: Mapping[str, Field], outgoing: Mapping[int, Outgoing], dealt: Assignment
    ) -> Announcement:
        """One sum over the ranks: who answered, with which weight, how many bytes, and what bounds an exact sum."""
        exact = [name for name, declared in fields.items() if self._is_added_exactly(name, declared)]
        table = np.zeros((len(dealt.clients), 2 + 2 * len(fields) + len(exact)), np.float64)
        place = {client: row for row, client in enumerate(dealt.clients)}
        for client, reply in outgoing.items():
            numbers = [number for name in fields for number in (reply.data[name].numel(), reply.lengths[name])]
            table[place[client]] = [1.0, reply.weight, *numbers, *(reply.peaks[name] for name in exact)]
        table = self._comm.sum_everywhere(table.reshape(-1)).reshape(table.shape)
        clients = tuple(client for client in dealt.clients if table[place[client], 0] > 0)

        def column(index: int) -> dict[int, int]:
            return {client: int(table[place[client], index]) for client in clients}

        nbytes = {name: column(2 + 2 * i) for i, name in enumerate(fields)}
        lengths = {name: column(3 + 2 * i) for i, name in enumerate(fields)}
        weights = {client: float(table[place[client], 1]) for client in clients}
        bounds = {}
        for column_of_peaks, name in enumerate(exact, start=2 + 2 * len(fields)):
            peaks = [float(table[place[client], column_of_peaks]) for client in clients]
            bounds[name] = bound(peaks, [factor_of(fields[name].reduce, weights[client]) for client in clients])
        logical: Sizes = {("up", name): nbytes[name] for name in fields}
        if takes_weights(fields):
            logical["up", WEIGHT] = dict.fromkeys(clients, 8)
        return Announcement(clients, weights, nbytes, lengths, bounds, logical)

    def _is_added_exactly(self, name: str, declared: Field) -> bool:
        return sums_exactly(declared, self._reduction, self._codec("up", name).plain)

    def collect(
        self,
        phase: str,
        fields: Mapping[str, Field],
        outgoing: Mapping[int, Outgoing],
        known: Announcement,
        dealt: Assignment,
    ) -> Received | None:
        """Bring the announced replies to rank 0; the others get None."""
        route = partial(self._route, "up")
        collection = Collection(self._comm, self._codec, self._device, phase, fields, outgoing, known, dealt, route)
        return collection.run(self._reduction)
