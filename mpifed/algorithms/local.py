"""Two bounds that exchange nothing: every client by itself, and all data in one place.

With a `[transfer]` in the job a client begins with what that leaves (`mpifed.learning.transfer`), as FedMD's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mpifed.algorithms.base import Absent, Algorithm, ClientContext, Env, Payload, Reply, State
from mpifed.learning.local import local_training
from mpifed.learning.transfer import first_model


@dataclass(frozen=True)
class Local(Algorithm):
    """No collaboration, the lower bound: each client trains a model of its own.

    Client state: `model` `[d]`, `buffers` `[b]`.
    """

    evaluates: ClassVar[Literal["server", "clients"]] = "clients"
    stateful: ClassVar[bool] = True
    begins_with_transfer: ClassVar[bool] = True

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        state = state or first_model(ctx)
        ctx.model.load(state["model"], state["buffers"])
        local_training(ctx)
        return {"model": ctx.model.parameters.detach().clone(), "buffers": ctx.model.buffers.clone()}, Reply({})

    def client_predictor(self, state: State, env: Env, client: int) -> tuple[Tensor, Tensor]:
        return (state["model"], state["buffers"]) if state else env.initial(client)


@dataclass(frozen=True)
class Pooled(Local):
    """All data in one place, the upper bound: one client, or one of each of `client_models`, holds every sample."""

    pooled: ClassVar[bool] = True
