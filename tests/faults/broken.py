"""Algorithms that go wrong on purpose, for jobs that name them by import path; healthy, each is SCAFFOLD.

With `HEALTHY=1` in the environment nothing goes wrong: the fault has been repaired, and the run can go on.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass

from mpifed.algorithms.base import Absent, ClientContext, Payload, Reply, State, Uploads
from mpifed.algorithms.scaffold import Scaffold
from tests.launch import RANK_VARIABLES

HEALTHY = "MPIFED_TEST_HEALTHY"


@dataclass(frozen=True)
class BadClients(Scaffold):
    """In round `round` clients raise, upload what is not finite, sleep, hang, leave, or write into the download."""

    round: int = 2
    raising: tuple[int, ...] = ()
    nan: tuple[int, ...] = ()
    inf: tuple[int, ...] = ()
    sleeping: tuple[int, ...] = ()
    hanging: tuple[int, ...] = ()
    leaving: tuple[int, ...] = ()
    writing: tuple[int, ...] = ()

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        if ctx.round != self.round or HEALTHY in os.environ:
            return super().client(state, down, ctx)
        if ctx.id in self.raising:
            raise ValueError(f"client {ctx.id} is broken on purpose")
        if ctx.id in self.sleeping:
            time.sleep(1.0)
        if ctx.id in self.hanging:
            time.sleep(10**6)
        if ctx.id in self.leaving:
            raise SystemExit(0)
        if ctx.id in self.writing:
            down["model"].add_(1.0)
        state, reply = super().client(state, down, ctx)
        poison = float("nan") if ctx.id in self.nan else float("inf") if ctx.id in self.inf else 0.0
        if poison != 0.0 and isinstance(reply, Reply):
            update = reply.upload["update"].clone()
            update[7] = poison
            reply = Reply(reply.upload | {"update": update}, reply.weight)
        return state, reply


@dataclass(frozen=True)
class BadServer(Scaffold):
    """The server's step raises in round `round`."""

    round: int = 2

    def server(self, server: State, uploads: Uploads, round_: int) -> State:
        if round_ == self.round and HEALTHY not in os.environ:
            raise ValueError("the server is broken on purpose")
        return super().server(server, uploads, round_)


@dataclass(frozen=True)
class FullDisk(Scaffold):
    """From round `round` on, no file that rank `rank` writes can grow beyond `size` bytes: its disk is full.

    The system refuses such a write as it refuses one to a full disk (Python ignores SIGXFSZ). The limit comes with the
    first step of that round and not at the start, as MPI's shared memory consists of files as well.
    """

    round: int = 2
    rank: int = 0
    size: int = 1_000_000

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        self._fill(ctx.round)
        return super().client(state, down, ctx)

    def server(self, server: State, uploads: Uploads, round_: int) -> State:
        self._fill(round_)
        return super().server(server, uploads, round_)

    def _fill(self, round_: int) -> None:
        own = next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)
        if round_ == self.round and own == self.rank and HEALTHY not in os.environ:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))
