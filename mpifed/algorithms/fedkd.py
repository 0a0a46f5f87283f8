"""FedKD. Wu, Wu, Lyu, Huang, Xie: Communication-efficient federated learning via knowledge distillation, Nature
Communications 13, 2032 (2022), https://doi.org/10.1038/s41467-022-29763-x, arXiv 2108.13323, Algorithm 1; the authors'
code: https://github.com/wuch15/FedKD.

Every client keeps a large model of its own, the mentor (`[[client_models]]`), and a copy of a small shared one, the
mentee (`[model]`). Both train on the client's samples and learn from each other (`mpifed.learning.mutual`). Only what
the mentee has learnt travels, S_k - S, compressed by `codec = {"up.update" = "svd", "down.update" = "svd"}`:

    phase train   client k of the round: train T_k and S_k; upload S_k - S
                  server: keep the mean of the uploads, u
    phase apply   server: send u to all clients, absent ones too; S <- S + u, as it was decoded
                  every client: S <- S + u, as it was decoded

So every client's S and the server's are the same in every bit, whatever a codec makes of u on the way. Predictions are
the mentors'. Departures from the print: an exchange follows local training and not every gradient (as the paper's own
experiments, and its code); nothing is encrypted; the client's learning rate is inside its update, so that the server
only adds. Where paper and code differ is a switch each; `docs/algorithms/fedkd.md` has the table.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Range
from torch import Tensor

from mpifed.algorithms.base import Absent, ClientContext, Env, Field, Payload, Phase, Reply, State, Uploads
from mpifed.algorithms.fedavg import FedAvg
from mpifed.algorithms.variants import OF_VARIANT, Variants, settle
from mpifed.learning.mutual import Mutual, mutual_training, projection_shapes

Weight = Annotated[float, Range(ge=0)]

VARIANTS: Variants = {
    "paper": {
        "projection": True,
        "kl": "batchmean",
        "gradients": "own",
        "detach_targets": True,
        "detach_denominator": True,
        "epsilon": 1e-6,
        "optimizer_state": "fresh",
    },
    "official": {
        "projection": False,
        "kl": "mean",
        "gradients": "sum",
        "detach_targets": False,
        "detach_denominator": False,
        "epsilon": 0.0,
        "optimizer_state": "kept",
    },
}


@dataclass(frozen=True)
class FedKD(FedAvg):
    """Server state: the mentee, as FedAvg's model. Client state: `mentor` and `mentee`, with `mentor_buffers` and
    `mentee_buffers`; `projection`, its W^h; and, where optimisers are kept, `optimizers`."""

    evaluates: ClassVar[Literal["server", "clients", "both"]] = "both"
    stateful: ClassVar[bool] = True
    needs_client_models: ClassVar[bool] = True

    weighting: Literal["examples", "uniform"] = "uniform"
    """Weight of a client in the mean: equal (paper, code), or its number of samples."""
    variant: Literal["paper", "official"] = "paper"
    """Sets the switches below that are not given: the paper's losses, or those of the authors' code."""
    distillation: Weight = 1.0
    """Weight of the divergence between the predictions; 0 leaves it out."""
    hidden: Weight = 1.0
    """Weight of the distance between hidden states; 0 leaves it out."""
    attention: Weight = 1.0
    """Weight of the distance between attention maps, where both models have such; 0 leaves it out."""
    adaptive: bool = True
    """Divide these terms by D, the sum of both task losses."""
    mentor_lr: Annotated[float, Range(gt=0)] | None = None
    """Learning rate of the mentor in round 1; `local.lr`, which is the mentee's, unless given."""
    projection: bool = OF_VARIANT
    """A learnable matrix W^h between the hidden states of every pair of layers, kept by the client."""
    kl: Literal["batchmean", "mean"] = OF_VARIANT
    """The divergence of a sample (`batchmean`), or that over the number of classes (`mean`)."""
    gradients: Literal["own", "sum"] = OF_VARIANT
    """A model follows the gradient of its own loss, or both that of the sum, with the hidden loss twice."""
    detach_targets: bool = OF_VARIANT
    """The other model's predictions are constants; of importance with `gradients = "sum"` only."""
    detach_denominator: bool = OF_VARIANT
    """D is a constant."""
    epsilon: Weight = OF_VARIANT
    """Added to D."""
    optimizer_state: Literal["fresh", "kept"] = OF_VARIANT
    """Optimisers begin anew every round, or go on where the client's last round left them."""

    def __post_init__(self) -> None:
        settle(self, VARIANTS)

    @property
    def mutual(self) -> Mutual:
        """The losses."""
        return Mutual(**{field.name: getattr(self, field.name) for field in fields(Mutual)})

    def check_models(self, env: Env, client: int) -> None:
        projection_shapes(self.mutual, env.model(client), env.model(), env)

    def phases(self, env: Env) -> tuple[Phase, ...]:
        update, nothing = self.up(env), dict[str, Field]()
        return (
            Phase("train", lambda t: nothing, lambda t: update, lambda s, t: {}, self.train_both, self.average),
            Phase(
                "apply",
                lambda t: update,
                lambda t: nothing,
                self.download,
                self.apply,
                lambda server, uploads, t: server,
                clients="all",
            ),
        )

    # --- client: train both -------------------------------------------------------------------------------------------
    def client_init(self, env: Env, client: int) -> State:
        (mentor, mentor_buffers), (mentee, mentee_buffers) = env.initial(client), env.initial()
        shapes = projection_shapes(self.mutual, env.model(client), env.model(), env)
        generator = env.generator("projection", client)
        return {
            "mentor": mentor,
            "mentor_buffers": mentor_buffers,
            "mentee": mentee,
            "mentee_buffers": mentee_buffers,
            # uniform in +-1/sqrt(width of the mentee), as torch starts any linear layer
            "projection": {
                str(layer): (2 * torch.rand(shape, generator=generator) - 1).to(env.device) / shape[1] ** 0.5
                for layer, shape in enumerate(shapes)
            },
        }

    def train_both(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        mentor, mentee = ctx.model, ctx.env.model()
        mentor.load(state["mentor"], state["mentor_buffers"])
        mentee.load(state["mentee"], state["mentee_buffers"])
        matrices = state.get("projection", {})  # a state drops what is empty
        projections, optimizers = mutual_training(
            ctx, self.mutual, list(matrices.values()), self.mentor_lr, state.get("optimizers")
        )
        state = state | {
            "mentor": mentor.parameters.detach().clone(),
            "mentor_buffers": mentor.buffers.clone(),
            "projection": dict(zip(matrices, projections, strict=True)),
        }
        if self.optimizer_state == "kept":
            state["optimizers"] = optimizers
        # The mentee stays where it was until the mean of all arrives; of running statistics, only shared ones do.
        upload = {"update": mentee.parameters.detach() - state["mentee"]}
        if "buffers_update" in self.up(ctx.env):
            upload["buffers_update"] = mentee.buffers - state["mentee_buffers"]
        else:
            state["mentee_buffers"] = mentee.buffers.clone()
        return state, Reply(upload, weight=ctx.examples)

    # --- server -------------------------------------------------------------------------------------------------------
    def average(self, server: State, uploads: Uploads, round_: int) -> State:
        updates = {"update": self.server_lr * uploads.mean("update")}
        if "buffers" in server:
            updates["buffers_update"] = uploads.mean("buffers_update")
        return server | updates

    def download(self, server: State, round_: int) -> Payload:
        return {name: server[name] for name in ("update", "buffers_update") if name in server}

    def sent(self, server: State, down: Payload, round_: int) -> State:
        """Phase `apply`: the server's mentee moves by what the clients decoded."""
        if "update" not in down:
            return server
        moved = {"model": server["model"] + down["update"]}
        if "buffers_update" in down:
            moved["buffers"] = server["buffers"] + down["buffers_update"]
        return moved

    # --- client: apply ------------------------------------------------------------------------------------------------
    def apply(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        state = state | {"mentee": state["mentee"] + down["update"]}
        if "buffers_update" in down:
            state["mentee_buffers"] = state["mentee_buffers"] + down["buffers_update"]
        return state, Reply({})

    def client_predictor(self, state: State, env: Env, client: int) -> tuple[Tensor, Tensor]:
        return state["mentor"], state["mentor_buffers"]
