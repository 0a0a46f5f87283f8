"""The collectives of one tree: every rank receives from and sends to the ranks next to it, and passes on.

Messages are cut, and a piece is passed on when it is there, while the next one comes: a way over several ranks takes
hardly longer than the way to the first. Every rank knows the lengths of all messages, so nobody has to ask; what is
empty is not sent. Between two ranks messages arrive in the order in which they were sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mpifed.comm.routes import Tree

Buffer = npt.NDArray[Any]

AHEAD = 4
"""Pieces that a rank has room for, beside its sum, while it adds up those of the ranks below it."""


class Peers(Protocol):
    """Messages from this rank to others. None blocks but `finish`; a buffer belongs to its message until then."""

    def send(self, buffer: Buffer, to: int) -> Any: ...

    def receive(self, buffer: Buffer, source: int) -> Any: ...

    def finish(self, request: Any) -> None: ...


def broadcast(peers: Peers, tree: Tree, rank: int, buffer: Buffer, piece_bytes: int) -> None:
    """Rank 0's buffer, of one axis, in everybody's."""
    pieces = cut(buffer, piece_bytes)
    arriving = [peers.receive(piece, tree.parents[rank]) for piece in pieces] if rank else []
    leaving = []
    for number, piece in enumerate(pieces):
        if rank:
            peers.finish(arriving[number])
        leaving += [peers.send(piece, child) for child in tree.children[rank]]
    _finish_all(peers, leaving)


def reduce(
    peers: Peers, tree: Tree, rank: int, values: Buffer, gives: Sequence[bool], piece_bytes: int
) -> Buffer | None:
    """At rank 0 the sum over the ranks that give, of one axis; the others get None. Added in the tree's order."""
    children = [child for child in tree.children[rank] if any(gives[other] for other in (child, *tree.below[child]))]
    if not gives[rank]:
        total = np.zeros_like(values)
    else:
        total = values.copy() if children or rank == 0 else values
    pieces = cut(total, piece_bytes)
    turns = [(piece, child) for piece in pieces for child in children]
    room = [np.empty_like(pieces[0]) for _ in turns[:AHEAD]]
    arriving: deque[Any] = deque()

    def expect(turn: int) -> None:
        if turn < len(turns):
            piece, child = turns[turn]
            arriving.append(peers.receive(room[turn % AHEAD][: piece.size], child))

    for turn in range(len(room)):
        expect(turn)
    leaving, turn = [], 0
    for piece in pieces:
        for _ in children:
            peers.finish(arriving.popleft())
            piece += room[turn % AHEAD][: piece.size]
            expect(turn + AHEAD)
            turn += 1
        if rank and (gives[rank] or children):
            leaving.append(peers.send(piece, tree.parents[rank]))
    _finish_all(peers, leaving)
    return total if rank == 0 else None


def gather(peers: Peers, tree: Tree, rank: int, send: Buffer, counts: Sequence[int], piece_bytes: int) -> Buffer | None:
    """At rank 0 everybody's bytes in rank order; the others get None."""
    receive = np.empty(sum(counts), np.uint8) if rank == 0 else None
    places = _parts(receive, counts) if receive is not None else {}
    arriving = []
    for child in tree.children[rank]:
        for other in (child, *tree.below[child]):
            place = places[other] if rank == 0 else np.empty(counts[other], np.uint8)
            arriving += [(piece, peers.receive(piece, child)) for piece in cut(place, piece_bytes)]
    leaving = []
    if rank == 0:
        places[0][:] = send
    else:
        leaving += [peers.send(piece, tree.parents[rank]) for piece in cut(send, piece_bytes)]
    for piece, request in arriving:
        peers.finish(request)
        if rank:
            leaving.append(peers.send(piece, tree.parents[rank]))
    _finish_all(peers, leaving)
    return receive


def scatter(
    peers: Peers, tree: Tree, rank: int, send: Buffer | None, counts: Sequence[int], piece_bytes: int
) -> Buffer:
    """Its own of rank 0's bytes, which are in rank order, for everybody."""
    if send is not None and rank == 0:
        places = _parts(send, counts)
    else:
        places = {other: np.empty(counts[other], np.uint8) for other in (rank, *tree.below[rank])}
    next_of = {other: child for child in tree.children[rank] for other in (child, *tree.below[child])}
    pieces = [(other, piece) for other in (rank, *tree.below[rank]) for piece in cut(places[other], piece_bytes)]
    arriving = [peers.receive(piece, tree.parents[rank]) for _, piece in pieces] if rank else []
    leaving = []
    for number, (other, piece) in enumerate(pieces):
        if rank:
            peers.finish(arriving[number])
        if other != rank:
            leaving.append(peers.send(piece, next_of[other]))
    _finish_all(peers, leaving)
    return places[rank] if rank else places[rank].copy()


def cut(buffer: Buffer, piece_bytes: int) -> list[Buffer]:
    """Views of a buffer of one axis, one after the other, each of at most so many bytes but at least one element."""
    step = max(1, piece_bytes // buffer.itemsize)
    return [buffer[start : start + step] for start in range(0, buffer.size, step)]


def _parts(whole: Buffer, counts: Sequence[int]) -> dict[int, Buffer]:
    ends = np.cumsum(counts)
    return {rank: whole[end - count : end] for rank, (end, count) in enumerate(zip(ends, counts, strict=True))}


def _finish_all(peers: Peers, requests: Sequence[Any]) -> None:
    for request in requests:
        peers.finish(request)
