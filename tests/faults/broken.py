"""Algorithms that go wrong on purpose, for jobs that name them by import path; healthy, each is SCAFFOLD."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from typing import Literal

import torch

from mpifed.algorithms.base import Absent, ClientContext, Payload, Reply, State, Uploads
from mpifed.algorithms.scaffold import Scaffold
from tests.launch import RANK_VARIABLES


@dataclass(frozen=True)
class BadClients(Scaffold):
    """In round `round` the clients `clients` do as `fault` says; `nan` and `inf` poison one number of the upload."""

    fault: Literal["raise", "nan", "inf", "sleep", "hang"] = "raise"
    round: int = 2
    clients: tuple[int, ...] = (1,)

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        bad = ctx.round == self.round and ctx.id in self.clients
        if bad and self.fault == "raise":
            raise ValueError("this client is broken on purpose")
        if bad and self.fault in ("sleep", "hang"):
            time.sleep(2.0 if self.fault == "sleep" else 10**6)
        state, reply = super().client(state, down, ctx)
        if bad and self.fault in ("nan", "inf") and isinstance(reply, Reply):
            poisoned = torch.zeros(reply.upload["update"].shape).index_fill_(0, torch.tensor(7), float(self.fault))
            reply = Reply(reply.upload | {"update": reply.upload["update"] + poisoned}, reply.weight)
        return state, reply


@dataclass(frozen=True)
class BadServer(Scaffold):
    """The server's step raises in round `round`."""

    round: int = 2

    def server(self, server: State, uploads: Uploads, round_: int) -> State:
        if round_ == self.round:
            raise ValueError("this server is broken on purpose")
        return super().server(server, uploads, round_)


@dataclass(frozen=True)
class FullDisk(Scaffold):
    """From round `round` on, no file that rank `rank` writes can grow beyond `bytes`: its disk is full.

    The system refuses such a write as it refuses one to a full disk (Python ignores SIGXFSZ). The limit comes with the
    first step of that round and not at the start, as MPI's shared memory consists of files as well.
    """

    round: int = 2
    rank: int = 0
    bytes: int = 1_000_000

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        self._fill(ctx.round)
        return super().client(state, down, ctx)

    def server(self, server: State, uploads: Uploads, round_: int) -> State:
        self._fill(round_)
        return super().server(server, uploads, round_)

    def _fill(self, round_: int) -> None:
        own = next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)
        if round_ == self.round and own == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, self.bytes))
