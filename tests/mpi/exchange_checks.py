"""The exchange over real MPI does what it does in one process: the same values bit for bit, and the same bytes counted.

Each check talks through the communicator that it is given, then once more on threads, and compares: on the same number
of ranks everything that a rank has, on one rank what the server has. See `checks` for how they are run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from mpifed.algorithms.base import Each, Field, Mean, Reply, Sum
from mpifed.codecs import CODECS
from mpifed.comm import collection
from mpifed.comm.collection import Received
from mpifed.comm.communicator import Communicator
from mpifed.comm.exchange import Exchange
from mpifed.comm.inprocess import InProcess, run_ranks
from mpifed.component import resolve
from mpifed.federation.roster import Roster
from mpifed.types import Payload
from tests.mpi.checks import Check

CLIENTS = 7
SILENT = (2, 5)
"""Clients that are asked and do not answer."""

DOWN = {
    "model": Field((1001,)),
    "indices": Field((None,), torch.int64),
    "teacher": Field((4, 2), to="each"),
    "news": Field((3,), to="everybody"),
}
UP = {
    "update": Field((1001,), reduce=Mean("reply")),
    "long": Field((collection.EXACT_ELEMENTS + 1,), reduce=Mean("reply")),
    "buffers": Field((13,), reduce=Mean("uniform")),
    "counts": Field((5,), torch.int64, Sum()),
    "precise": Field((7,), torch.float64, Sum()),
    "logits": Field((None, 3), reduce=Each()),
    "labels": Field((None,), torch.int64, Each("uniform")),
}


def values(fields: dict[str, Field], key: int, exact: bool, rows: int = 0) -> Payload:
    """A payload drawn from `key`; `exact`: small multiples of 1/64, whose float32 sums are exact in any order."""
    generator = torch.Generator().manual_seed(key)
    payload = {}
    for name, declared in fields.items():
        shape = [key % 4 if size is None else size for size in declared.shape]  # unknown lengths 0 to 3
        shape = [rows, *shape] if declared.to == "each" else shape
        if exact or not declared.dtype.is_floating_point:
            drawn = torch.randint(-50, 50, shape, generator=generator)
            payload[name] = drawn.to(declared.dtype) / 64 if declared.dtype.is_floating_point else drawn
        else:
            payload[name] = torch.randn(shape, generator=generator, dtype=torch.float64).to(declared.dtype)
    return payload


def bits(tensor: Tensor) -> str:
    """Shape, dtype and bytes, as text."""
    memory = tensor.contiguous().reshape(-1).view(torch.uint8)
    return f"{tuple(tensor.shape)} {tensor.dtype} {memory.numpy().tobytes().hex()}"


def talk(comm: Communicator, reduction: Literal["ordered", "tree"], codec: str) -> dict[str, Any]:
    """Two rounds of one phase; everything that this rank has afterwards."""
    exact = reduction == "tree"
    roster = Roster(0, comm.size, [10 * (client + 1) for client in range(CLIENTS)], 1.0, "uniform", stateful=False)
    used = resolve(CODECS, codec, "codec")()
    talking = Exchange(comm, lambda way, name: used, reduction, torch.device("cpu"))
    comm.traffic.take()
    had: dict[str, Any] = {}
    for round_, asked in ((1, range(CLIENTS)), (2, (0, 2, 3, 6))):
        dealt = roster.deal(asked)
        payload = values(DOWN, round_, exact, len(dealt.clients)) if comm.rank == 0 else None
        shared, own, sizes = talking.download("train", DOWN, payload, dealt, CLIENTS, 0.5)
        outgoing = {
            client: talking.encode(UP, Reply(values(UP, 100 + client, exact), client + 1.0), {}, 0.5)
            for client in dealt.by_rank[comm.rank]
            if client not in SILENT
        }
        known = talking.announce(UP, outgoing, dealt)
        received = talking.collect("train", UP, outgoing, known, dealt)
        had[f"round {round_}"] = {
            "shared": {name: bits(value) for name, value in shared.items()},
            "own": {client: {name: bits(value) for name, value in rows.items()} for client, rows in own.items()},
            "logical": sizes | known.logical,
            "answered": known.clients,
            "gave": bool(outgoing),
            "server": None if received is None else seen_by_the_server(received),
        }
    return had | {"traffic": comm.traffic.take()}


def seen_by_the_server(received: Received) -> dict[str, Any]:
    seen: dict[str, Any] = {"clients": list(received.clients), "weights": received.weights.tolist()}
    seen |= {name: bits(received.mean(name)) for name in ("update", "long", "buffers")}
    seen |= {name: bits(received.sum(name)) for name in ("counts", "precise")}
    return seen | {name: [bits(value) for value in received.each(name)] for name in ("logits", "labels")}


def compare(comm: Communicator, reduction: Literal["ordered", "tree"], codec: str) -> None:
    had = talk(comm, reduction, codec)
    threads = run_ranks(comm.size, lambda thread: talk(thread, reduction, codec))[comm.rank]
    assert had == threads
    if comm.rank == 0:
        alone = talk(InProcess.alone(), reduction, codec)
        for round_ in ("round 1", "round 2"):
            for what in ("shared", "logical", "answered", "server"):
                assert had[round_][what] == alone[round_][what], (round_, what)
    comm.barrier()


@contextmanager
def slices(comm: Communicator, nbytes: int) -> Iterator[None]:
    """Rank 0 receives an ordered reduction in slices of `nbytes`. The threads of a process share the constant."""
    usual = collection.SLICE_BYTES
    comm.barrier()
    collection.SLICE_BYTES = nbytes
    comm.barrier()
    try:
        yield
    finally:
        comm.barrier()
        collection.SLICE_BYTES = usual


def ordered(comm: Communicator) -> None:
    compare(comm, "ordered", "identity")


def ordered_in_slices(comm: Communicator) -> None:
    """6,000 bytes for 5 replies are 1,200 bytes of each at a time: fields are cut in the middle."""
    with slices(comm, 6000):
        compare(comm, "ordered", "identity")


def ordered_half(comm: Communicator) -> None:
    compare(comm, "ordered", "half")


def tree(comm: Communicator) -> None:
    compare(comm, "tree", "identity")


def tree_half(comm: Communicator) -> None:
    compare(comm, "tree", "half")


def what_is_sent_arrives(comm: Communicator) -> None:
    """MPI bytes by kind. Uploads and own rows: all ranks together send what rank 0 receives, or the reverse, which are
    the logical bytes; but of an exact sum one vector in float64 is sent by each rank that has replies or, where these
    are many, by every rank to receive one. Shared fields: rank 0 sends one payload, however many clients there are, and
    each other rank receives it."""
    had = talk(comm, "ordered", "identity")
    gave = [round_ for round_ in ("round 1", "round 2") if had[round_]["gave"]]
    everybody = comm.gather_bytes(json.dumps([*had["traffic"], gave]).encode())
    if everybody is None:
        return
    sent, received, gives_of_rank = zip(*(json.loads(traffic) for traffic in everybody), strict=True)
    rounds = ("round 1", "round 2")
    vector = 8 * (collection.EXACT_ELEMENTS + 1)
    gives, expected = [0] * comm.size, 0
    for round_ in rounds:
        ranks = [rank for rank, gave in enumerate(gives_of_rank) if round_ in gave]
        gathered = len(ranks) <= collection.GATHERED_RANKS
        for rank in ranks if gathered else range(comm.size):
            gives[rank] += vector
        expected += vector * len(ranks) if gathered else vector
    assert [rank.get("train/up/long", 0) for rank in sent] == gives
    assert [rank.get("train/up/long", 0) for rank in received] == [expected] + [0] * (comm.size - 1)
    for name in UP.keys() - {"long"}:
        kind, logical = f"train/up/{name}", sum(sum(had[r]["logical"]["up", name].values()) for r in rounds)
        assert sum(rank.get(kind, 0) for rank in sent) == logical
        assert [rank.get(kind, 0) for rank in received] == [logical] + [0] * (comm.size - 1)
    logical = sum(sum(had[r]["logical"]["down", "teacher"].values()) for r in rounds)
    assert sum(rank.get("train/down/teacher", 0) for rank in received) == logical
    assert [rank.get("train/down/teacher", 0) for rank in sent] == [logical] + [0] * (comm.size - 1)
    for name in ("model", "indices", "news"):
        kind, payload = f"train/down/{name}", sum(had[r]["logical"]["down", name][0] for r in rounds)
        assert [rank.get(kind, 0) for rank in sent] == [payload] + [0] * (comm.size - 1)
        assert [rank.get(kind, 0) for rank in received] == [0] + [payload] * (comm.size - 1)


CHECKS: dict[str, Check] = {
    check.__name__: check for check in (ordered, ordered_in_slices, ordered_half, tree, tree_half, what_is_sent_arrives)
}
