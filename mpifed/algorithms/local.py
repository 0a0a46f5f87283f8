"""Two bounds that exchange nothing: every client by itself, and all data in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mpifed.algorithms.base import Absent, Algorithm, ClientContext, Env, Payload, Reply, State
from mpifed.learning.local import local_training


@dataclass(frozen=True)
class Local(Algorithm):
    """No collaboration, the lower bound: each client trains a model of its own.

    Client state: `model` `[d]`, `buffers` `[b]`.
    """

    evaluates: ClassVar[Literal["server", "clients"]] = "clients"
    stateful: ClassVar[bool] = True

    def client_init(self, env: Env, client: int) -> State:
        parameters, buffers = env.initial(client)
        return {"model": parameters, "buffers": buffers}

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        ctx.model.load(*self.client_predictor(state, ctx.env, ctx.id))
        local_training(ctx)
        return {"model": ctx.model.parameters.detach().clone(), "buffers": ctx.model.buffers.clone()}, Reply({})

    def client_predictor(self, state: State, env: Env, client: int) -> tuple[Tensor, Tensor]:
        return state["model"], state["buffers"]


@dataclass(frozen=True)
class Pooled(Local):
    """All data in one place, the upper bound: one client holds every sample."""

    pooled: ClassVar[bool] = True
