"""Memory of a run on rank 0 and on the rank with the most, by what holds it (docs/scale.md has the formulas)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpifed.comm.collection import SLICE_BYTES
from mpifed.data.source import ArraySource, Source
from mpifed.federation.federation import Federation
from mpifed.predict.bytes import Exchange, Planner, declared_elements
from mpifed.predict.compute import Compute


@dataclass(frozen=True)
class Memory:
    """Bytes by holder, at rank 0 and on the largest of the other ranks (rank 0 itself, where it is alone)."""

    root: Mapping[str, int]
    rank: Mapping[str, int]


def memory(planner: Planner, exchanges: list[Exchange], compute: Compute | None, process: int) -> Memory:
    """Of a run whose largest exchanges are these; `process` is what a rank holds before it has any data or model."""
    federation, job = planner.federation, planner.federation.job
    parameters = 4 * federation.env.model().layout.size
    # without a trial: parameters, gradient, initial values and one more copy, of every architecture
    workspace = compute.workspace if compute is not None else 4 * parameters * max(1, job.architectures)
    usual = planner.usual_clients()
    indices = 8 * sum(federation.roster.examples) + 200 * federation.clients
    state = compute.client_state if compute is not None else 0

    def of(rank: int) -> dict[str, int]:
        held = {
            "process": process,
            "models and batches": workspace,
            "samples": _samples(federation, rank),
            "who holds what": indices,
            "client states": min(job.client_state_mb * 1_000_000, state * int(usual[rank])),
            "download": max((_download(exchange) for exchange in exchanges), default=0),
            "replies until collected": max((_replies(exchange, rank, state) for exchange in exchanges), default=0),
        }
        if rank == 0:
            held["server state"] = 2 * (compute.server_state if compute is not None else parameters)
            held["collected replies"] = max((_collected(planner, exchange) for exchange in exchanges), default=0)
        return held

    most = max(range(planner.ranks), key=lambda rank: (int(usual[rank]), rank))
    return Memory(of(0), of(most))


def _samples(federation: Federation, rank: int) -> int:
    """A set in arrays, of which a node has one copy, whole; of another a rank keeps its clients', where these stay."""
    source = federation.source
    assert source is not None
    sample = int(source.take("train", np.arange(1))[0].nbytes) + 8
    whole: Source = source
    while not isinstance(whole, ArraySource) and hasattr(whole, "_source"):
        whole = whole._source  # of which this is a part
    if isinstance(whole, ArraySource):
        return sample * len(whole.train_labels)
    if not federation.roster.fixed:
        return 8 * len(source.train_labels)
    mine = federation.roster.deal(range(federation.clients)).by_rank[rank]
    return sample * sum(federation.roster.examples[client] for client in mine)


def _download(exchange: Exchange) -> int:
    """The buffer, and what is decoded of it; at rank 0 every client's own row too, which others hold of their own."""
    step = exchange.step
    return sum(
        2 * (size.most or size.least) * (len(step.asked) if step.down[name].to == "each" else 1)
        for (direction, name), size in step.sizes.items()
        if direction == "down"
    )


def _replies(exchange: Exchange, rank: int, state: int) -> int:
    """Every reply of a rank's clients is kept until all ranks have announced theirs, with the client's next state."""
    each = sum(size.most or size.least for (way, _), size in exchange.step.sizes.items() if way == "up")
    return int(exchange.clients[rank]) * (each + state)


def _collected(planner: Planner, exchange: Exchange) -> int:
    """At rank 0: a sum in float64 and the slice that is added, or all replies in the buffer and as tensors."""
    held = 0
    plain = {name: planner.federation.codec("up", name).plain for name in exchange.step.up}
    for name, declared in exchange.step.up.items():
        size = exchange.step.sizes["up", name]
        if planner.adds_on_ranks(exchange.step, name) or planner.is_gathered_in_slices(exchange.step, name):
            held += 12 * declared_elements(declared) + SLICE_BYTES
        else:
            encoded = len(exchange.step.asked) * (size.most or size.least)
            held += encoded + (0 if plain[name] else len(exchange.step.asked) * 4 * declared_elements(declared))
    return held
