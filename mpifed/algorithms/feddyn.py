"""FedDyn. Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama: Federated Learning Based on Dynamic
Regularization, ICLR 2021, arXiv 2111.04263.

Client k minimises L_k(w) - <g_k, w> + (alpha/2) ||w - x||^2 and moves g_k by -alpha (y_k - x); the server's next
model is the plain mean of the clients' models minus h/alpha, h being the mean of g_k over *all* clients. As in the
authors' code, memories are kept as lambda_k = -g_k / alpha, so that h/alpha is -mean(lambda): the model is the mean of
the round's models plus the mean of all memories, and clients with their own alpha_k need no rescaling. The quadratic
term is an explicit part of the gradient (the authors' code folds it into weight decay): clipping sees all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field as Range
from torch import Tensor

from mpifed.algorithms.base import Absent, ClientContext, Env, Payload, Reply, State, Uploads
from mpifed.algorithms.fedavg import FedAvg, averaged_buffers
from mpifed.learning.local import Correction


@dataclass(frozen=True)
class FedDyn(FedAvg):
    """Server state: `model`, `memory` (mean of all lambda_k) and `active` (mean model of the round), all `[d]`.

    Client state: `memory` (lambda_k) `[d]`.
    """

    stateful: ClassVar[bool] = True

    weighting: Literal["uniform"] = "uniform"
    """The paper averages the active clients equally."""
    alpha: Annotated[float, Range(gt=0)] = 0.01
    """Weight of the dynamic regulariser; the paper searches 0.001, 0.01, 0.1."""
    adaptive: bool = False
    """alpha_k = alpha / (n_k over the mean of all n), as the authors' code has it for unequal clients."""
    predict: Literal["server", "active"] = "server"
    """Which model is evaluated: the one that is sent, or the mean of the round's models."""

    def check(self, local: Any) -> None:
        if self.server_lr != 1.0:
            raise ValueError("server_lr: FedDyn has no server step size, leave it at 1")

    # --- server: send -------------------------------------------------------------------------------------------------
    def server_init(self, env: Env) -> State:
        server = super().server_init(env)
        zero = torch.zeros_like(env.initial()[0])
        return server | {"memory": zero, "active": env.initial()[0], "clients": torch.tensor(env.clients)}

    # --- client -------------------------------------------------------------------------------------------------------
    def client_init(self, env: Env, client: int) -> State:
        return {"memory": torch.zeros_like(env.initial(client)[0])}

    def correction(self, state: State, down: Payload, ctx: ClientContext) -> Correction:
        """The gradient of alpha_k <lambda_k, w> + (alpha_k/2) ||w - x||^2 is alpha_k (w - (x - lambda_k))."""
        alpha = self.alpha / ctx.relative_examples if self.adaptive else self.alpha
        centre = down["model"] - state["memory"]

        def dynamic(parameters: Tensor, gradient: Tensor) -> None:
            gradient.add_(parameters - centre, alpha=alpha)

        return dynamic

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        state, _ = self.train(state, down, ctx)
        upload = self.update(down, ctx)
        return state | {"memory": state["memory"] + upload["update"]}, Reply(upload)

    def acknowledged(self, before: State, after: State, down: Payload, sent: Payload) -> State:
        """lambda_k moves by what the server received, so that its memory stays the mean of all lambda_k."""
        return after | {"memory": before["memory"] + sent["update"]}

    # --- server: receive ----------------------------------------------------------------------------------------------
    def server(self, server: State, uploads: Uploads, round_: int) -> State:
        update = uploads.mean("update")
        active = server["model"] + update
        memory = server["memory"] + update * (len(uploads.clients) / server["clients"])
        return (
            server | {"model": active + memory, "memory": memory, "active": active} | averaged_buffers(server, uploads)
        )

    def predictor(self, server: State, env: Env) -> tuple[Tensor, Tensor]:
        model = server["model" if self.predict == "server" else "active"]
        return super().predictor(server | {"model": model}, env)
