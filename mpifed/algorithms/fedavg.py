"""FedAvg. McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-Efficient Learning of Deep Networks
from Decentralized Data, AISTATS 2017, arXiv 1602.05629, Algorithm 1.

The server sends its model x; every client of the round trains it into y_k and uploads y_k - x; the server adds the
mean, weighted by the clients' numbers of samples n_k and normalised over the clients that answered. (The printed
algorithm divides by the samples of all clients, which shrinks the model under partial participation; implementations
normalise over the round.) Uploading the difference instead of y_k gives the same mean, and is what codecs compress
well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field as Range
from torch import Tensor

from mpifed.algorithms.base import Absent, Algorithm, ClientContext, Env, Field, Mean, Payload, Reply, State, Uploads
from mpifed.learning.local import Correction, Trained, local_training


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """Server state: `model` `[d]`, and `buffers` `[b]` where running statistics are averaged. Clients keep nothing."""

    weighting: Literal["examples", "uniform"] = "examples"
    """Weight of a client in the mean: its number of samples (the paper), or equal (FedProx's analysis)."""
    server_lr: Annotated[float, Range(gt=0)] = 1.0
    """Server step size: x <- x + server_lr * mean(y_k - x)."""

    @property
    def mean(self) -> Mean:
        """How the clients' uploads are averaged."""
        return Mean("reply" if self.weighting == "examples" else "uniform")

    # --- what crosses the network -------------------------------------------------------------------------------------
    def down(self, env: Env) -> Mapping[str, Field]:
        model = env.model()
        fields = {"model": Field((model.layout.size,), layout=model.layout)}
        if env.shared_buffers and model.buffer_layout.size:
            fields["buffers"] = Field((model.buffer_layout.size,), layout=model.buffer_layout)
        return fields

    def up(self, env: Env) -> Mapping[str, Field]:
        model = env.model()
        fields = {"update": Field((model.layout.size,), reduce=self.mean, layout=model.layout)}
        if env.shared_buffers and model.buffer_layout.size:
            fields["buffers_update"] = Field((model.buffer_layout.size,), reduce=self.mean, layout=model.buffer_layout)
        return fields

    # --- server: send -------------------------------------------------------------------------------------------------
    def server_init(self, env: Env) -> State:
        parameters, buffers = env.initial()
        shared = env.shared_buffers and buffers.numel() > 0
        return {"model": parameters} | ({"buffers": buffers} if shared else {})

    def download(self, server: State, round_: int) -> Payload:
        return {name: server[name] for name in ("model", "buffers") if name in server}

    # --- client -------------------------------------------------------------------------------------------------------
    def correction(self, state: State, down: Payload, ctx: ClientContext) -> Correction | None:
        """What a variant adds to every gradient of the local training; nothing in FedAvg."""
        return None

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        state, _ = self.train(state, down, ctx)
        return state, Reply(self.update(down, ctx), weight=ctx.examples)

    def train(self, state: State, down: Payload, ctx: ClientContext, **options: Any) -> tuple[State, Trained]:
        """Local training from the downloaded model; running statistics that a client keeps stay in its state.

        `options` are further ones of `local_training`: a variant's `loss`, say.
        """
        keeps = ctx.model.buffers.numel() > 0 and (ctx.env.own_buffers or "buffers" not in down)
        ctx.model.load(down["model"], state.get("buffers", ctx.env.initial()[1]) if keeps else down.get("buffers"))
        trained = local_training(ctx, self.correction(state, down, ctx), **options)
        if keeps:
            state = state | {"buffers": ctx.model.buffers.clone()}
        return state, trained

    def update(self, down: Payload, ctx: ClientContext) -> Payload:
        """y_k - x of the model that was just trained, and the same of its buffers."""
        update = {"update": ctx.model.parameters.detach() - down["model"]}
        if "buffers" in down:
            update["buffers_update"] = ctx.model.buffers - down["buffers"]
        return update

    # --- server: receive ----------------------------------------------------------------------------------------------
    def server(self, server: State, uploads: Uploads, round_: int) -> State:
        return (
            server
            | {"model": server["model"] + self.server_lr * uploads.mean("update")}
            | averaged_buffers(server, uploads)
        )

    def predictor(self, server: State, env: Env) -> tuple[Tensor, Tensor]:
        return server["model"], server.get("buffers", env.initial()[1])


def averaged_buffers(server: State, uploads: Uploads) -> State:
    """Running statistics are averaged plainly, whatever the algorithm does to the weights."""
    return {"buffers": server["buffers"] + uploads.mean("buffers_update")} if "buffers" in server else {}
