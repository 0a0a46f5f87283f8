"""Ranks as threads of one process: for tests of everything above MPI, and, with one rank, for a run without MPI."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from mpifed.comm.communicator import Buffer, Communicator

T = TypeVar("T")


class _World:
    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: list[Buffer | None] = [None] * size
        pairs = [(sender, receiver) for sender in range(size) for receiver in range(size)]
        self.mail: dict[tuple[int, int], queue.SimpleQueue[Buffer]] = {pair: queue.SimpleQueue() for pair in pairs}


class _Mail:
    """A copy of what is sent lies in the queue of its two ranks until the other one takes it."""

    def __init__(self, world: _World, rank: int) -> None:
        self._world, self._rank = world, rank

    def send(self, buffer: Buffer, to: int) -> None:
        self._world.mail[self._rank, to].put(buffer.copy())

    def receive(self, buffer: Buffer, source: int) -> tuple[Buffer, int]:
        return buffer, source

    def finish(self, request: tuple[Buffer, int] | None) -> None:
        if request is None:
            return
        buffer, source = request
        while not self._world.barrier.broken:  # which another rank's failure does
            try:
                came = self._world.mail[source, self._rank].get(timeout=0.05)
            except queue.Empty:
                continue
            assert (came.dtype, came.shape) == (buffer.dtype, buffer.shape), "a message of an unannounced length"
            np.copyto(buffer, came)
            return
        raise threading.BrokenBarrierError


class InProcess(Communicator):
    """One rank of a world of threads, as if it were on node `host`; `InProcess.alone()` is a world of one."""

    def __init__(self, world: _World, rank: int, host: str | None = None) -> None:
        super().__init__(rank, world.size)
        self._world, self._host = world, host
        self.peers = _Mail(world, rank)

    def host(self) -> str:
        return super().host() if self._host is None else self._host

    @classmethod
    def alone(cls) -> InProcess:
        return cls(_World(1), 0)

    def _exchange(self, mine: Buffer | None, act: Callable[[list[Buffer | None]], None]) -> None:
        """Show `mine` to everybody, act on what all have shown, and go on when all have acted."""
        self._world.slots[self.rank] = mine
        self.waiting(True)
        self._world.barrier.wait()
        act(self._world.slots)
        self._world.barrier.wait()
        self.waiting(False)

    def _broadcast(self, buffer: Buffer) -> None:
        def act(slots: list[Buffer | None]) -> None:
            if self.rank != 0:
                assert slots[0] is not None and slots[0].size == buffer.size, "broadcast of different lengths"
                np.copyto(buffer, slots[0])

        self._exchange(buffer, act)

    def _gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int]) -> None:
        assert send.size == counts[self.rank], "gather of an unannounced length"

        def act(slots: list[Buffer | None]) -> None:
            if receive is not None:
                np.concatenate([slot for slot in slots if slot is not None], out=receive)

        self._exchange(send, act)

    def _scatter(self, send: Buffer | None, receive: Buffer, counts: Sequence[int]) -> None:
        def act(slots: list[Buffer | None]) -> None:
            start = sum(counts[: self.rank])
            assert slots[0] is not None
            np.copyto(receive, slots[0][start : start + counts[self.rank]])

        self._exchange(send, act)

    def _reduce(self, send: Buffer, receive: Buffer | None) -> None:
        def act(slots: list[Buffer | None]) -> None:
            if receive is not None:
                receive[:] = 0
                for slot in slots:
                    assert slot is not None
                    receive[:] += slot

        self._exchange(send, act)

    def _allreduce(self, send: Buffer, receive: Buffer) -> None:
        self._exchange(send, lambda slots: np.copyto(receive, sum(slots)))  # type: ignore[arg-type]

    def barrier(self) -> None:
        self._world.barrier.wait()

    def meet(self, seconds: float) -> bool:
        try:
            self._world.barrier.wait(seconds)
        except threading.BrokenBarrierError:
            return False
        return True

    def abort(self, code: int) -> None:
        os._exit(code)


def run_ranks(size: int, main: Callable[[Communicator], T], hosts: Sequence[str] | None = None) -> list[T]:
    """`main(comm)` on `size` ranks that are threads; their results in rank order. A rank's exception ends all.

    `hosts`, by rank: the nodes on which they pretend to be.
    """
    world = _World(size)
    results: list[T | None] = [None] * size
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            results[rank] = main(InProcess(world, rank, hosts[rank] if hosts else None))
        except threading.BrokenBarrierError:
            pass  # another rank failed
        except BaseException as error:
            errors.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]
