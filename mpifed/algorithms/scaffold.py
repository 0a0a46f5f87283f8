"""SCAFFOLD. Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning, ICML 2020, arXiv 1910.06378, Algorithm 1.

Server control variate c and client control variates c_i (all zero at first, always c = mean of all c_i) correct every
local gradient by c - c_i. Departures from the print: Option II divides by the displacement of the local training, which
is K * lr for plain SGD as in the paper, and accounts for momentum, the round's step size and the steps really taken
otherwise (with momentum 0.9 the printed rule makes c_i up to ten times too large, and diverges). Control variates
belong to parameters only, never to running statistics. With `local.clip_norm` they are renewed from clipped steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mpifed.algorithms.base import Absent, ClientContext, Env, Field, Mean, Payload, Reply, State, Sum, Uploads
from mpifed.algorithms.fedavg import FedAvg, averaged_buffers
from mpifed.learning.local import Correction, full_gradient


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """Server state: `model` and `control` (c), both `[d]`. Client state: `control` (c_i) `[d]`."""

    stateful: ClassVar[bool] = True

    weighting: Literal["uniform"] = "uniform"
    """The paper averages clients equally; c = mean of c_i holds only so."""
    option: Literal["I", "II"] = "II"
    """How c_i is renewed: I, the full gradient at the received model; II, from the displacement (its experiments)."""
    payload: Literal["naive", "derived"] = "naive"
    """`naive` uploads the updates of the model and of c_i, 2d (the paper). `derived` uploads the model's alone: with
    Option II and equal displacements the server can compute the others."""

    def check(self, local: Any) -> None:
        if self.option == "II" and local.optimizer != "sgd":
            raise ValueError('option: Option II needs SGD, whose displacement is known; use option = "I"')
        if self.payload == "derived" and (self.option != "II" or local.steps is None):
            raise ValueError('payload: "derived" needs Option II and local.steps, so that all displacements are equal')

    # --- what crosses the network -------------------------------------------------------------------------------------
    def down(self, env: Env) -> Mapping[str, Field]:
        fields = dict(super().down(env))
        return fields | {"control": fields["model"]}

    def up(self, env: Env) -> Mapping[str, Field]:
        fields = dict(super().up(env))
        if self.payload == "derived":
            return fields | {"displacement": Field((), torch.float64, Mean("uniform"))}
        return fields | {"control_update": replace(fields["update"], reduce=Sum())}

    # --- server: send -------------------------------------------------------------------------------------------------
    def server_init(self, env: Env) -> State:
        server = super().server_init(env)
        # the number of all clients is part of the state because c moves by 1/N of the round's updates
        return server | {"control": torch.zeros_like(env.initial()[0]), "clients": torch.tensor(env.clients)}

    def download(self, server: State, round_: int) -> Payload:
        return super().download(server, round_) | {"control": server["control"]}

    def sent(self, server: State, down: Payload, round_: int) -> State:
        """`derived` computes what the clients do, from c as they received it; `server` forgets it again."""
        return server | ({"received": down["control"]} if self.payload == "derived" else {})

    # --- client -------------------------------------------------------------------------------------------------------
    def client_init(self, env: Env, client: int) -> State:
        return {"control": torch.zeros_like(env.initial(client)[0])}

    def correction(self, state: State, down: Payload, ctx: ClientContext) -> Correction:
        difference = down["control"] - state["control"]  # c - c_i

        def controlled(parameters: Tensor, gradient: Tensor) -> None:
            gradient.add_(difference)

        return controlled

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        c, c_i = down["control"], state["control"]
        if self.option == "I":
            ctx.model.load(down["model"], down.get("buffers"))
            new_c_i = full_gradient(ctx)
        state, trained = self.train(state, down, ctx)
        upload = self.update(down, ctx)
        if self.option == "II":
            new_c_i = c_i - c - upload["update"] / trained.displacement
        if self.payload == "derived":
            upload["displacement"] = torch.tensor(trained.displacement, dtype=torch.float64)
        else:
            upload["control_update"] = new_c_i - c_i
        return state | {"control": new_c_i}, Reply(upload)

    def acknowledged(self, before: State, after: State, down: Payload, sent: Payload) -> State:
        """c_i moves by what the server received, so that c stays the mean of all c_i."""
        if self.payload == "derived":
            return after | {"control": before["control"] - down["control"] - sent["update"] / sent["displacement"]}
        return after | {"control": before["control"] + sent["control_update"]}

    # --- server: receive ----------------------------------------------------------------------------------------------
    def server(self, server: State, uploads: Uploads, round_: int) -> State:
        update, c = uploads.mean("update"), server["control"]
        if self.payload == "derived":
            received = server["received"]
            server = {name: value for name, value in server.items() if name != "received"}
            added = -len(uploads.clients) * (received + update / uploads.mean("displacement"))
        else:
            added = uploads.sum("control_update")
        server = server | {"model": server["model"] + self.server_lr * update, "control": c + added / server["clients"]}
        return server | averaged_buffers(server, uploads)
