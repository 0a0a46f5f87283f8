"""FedMD. Li and Wang: Heterogenous Federated Learning via Model Distillation, 2019, arXiv 1910.03581, Algorithm 1;
authors' code: github.com/diogenes0319/FedMD_clean.

Clients with models of their own teach each other through the class scores that these give to public samples. A round:
the server draws a subset d_j of the public set; every client answers with its scores f_k(d_j), the logits before the
softmax; their mean f~ is sent back; every client trains towards it (digest) and then on its own samples (revisit).
Before its first round it has learnt from the public and from its own samples (the job's `[transfer]`).

The paper draws d_j at random; the authors' code draws it with the public classes in proportion (`variant`). Both take
the models as they are in this round. docs/algorithms/fedmd.md has the other departures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Range
from torch import Tensor

from mpifed.algorithms.base import (
    Absent,
    Algorithm,
    ClientContext,
    Env,
    Field,
    Mean,
    Payload,
    Phase,
    PublicSet,
    Reply,
    State,
    Uploads,
)
from mpifed.learning.distillation import LogitLoss, logit_loss
from mpifed.learning.local import adam_optimizer, learning_rate, local_training, model_optimizer
from mpifed.learning.scores import digest, scores
from mpifed.learning.transfer import first_model


@dataclass(frozen=True)
class FedMD(Algorithm):
    """Server state: `consensus` f~ `[n, classes]`, from `score` to `digest`.

    Client state: `model` `[d]`, `buffers` `[b]`; the moments of its two optimisers, `digest` (Adam) and `revisit` (that
    of `[local]`). n is `subset_size`, or all public samples where there are fewer.
    """

    evaluates: ClassVar[Literal["server", "clients", "both"]] = "clients"
    stateful: ClassVar[bool] = True
    needs_public: ClassVar[bool] = True
    begins_with_transfer: ClassVar[bool] = True

    variant: Literal["paper", "official"] = "paper"
    """Whose subset: `stratified` is false in the paper and true in the authors' code."""
    subset_size: Annotated[int, Range(ge=1)] = 5000
    """Public samples that a round is about."""
    stratified: bool | None = None
    """Every class has its share of the subset; left out, as `variant` has it."""
    weights: tuple[Annotated[float, Range(gt=0)], ...] = ()
    """c_k of the consensus sum c_k f_k / sum c_k, dealt in turn: client k has number k modulo their count. None: equal
    ones. The paper says that it lowered those of participants 0 and 9 on CIFAR, not by how much."""
    digest_epochs: Annotated[int, Range(ge=0)] = 1
    """Passes over the subset; with 0 clients go on as without collaboration."""
    digest_batch_size: Annotated[int, Range(ge=1)] = 256
    digest_lr: Annotated[float, Range(gt=0)] = 0.001
    """Of Adam, which is what digests."""
    digest_loss: LogitLoss = "l1"
    """Of the scores: the authors' mean absolute error, the mean square, or KL of the softmax at `temperature`."""
    temperature: Annotated[float, Range(gt=0)] = 1.0
    """Of `digest_loss = "kl"`."""
    moments: Literal["keep", "reset"] = "keep"
    """The optimisers' moments: kept by the client over all rounds, as the authors' code does, or new every round."""

    # --- what crosses the network -------------------------------------------------------------------------------------
    def phases(self, env: Env) -> tuple[Phase, ...]:
        n = self.size(env)
        indices = Field((n,), torch.int32)
        of_classes = Field((n, env.spec.classes), reduce=Mean("reply" if self.weights else "uniform"))

        def subset(server: State, round_: int) -> Payload:
            return {"indices": self.subset(env, round_)}

        def consensus(server: State, round_: int) -> Payload:
            # with its samples again: a client that did not come to `score` can digest, and nothing gets out of step
            return {"indices": self.subset(env, round_), "consensus": server["consensus"]}

        return (
            Phase(
                "score",
                down=lambda t: {"indices": indices},
                up=lambda t: {"logits": of_classes},
                download=subset,
                client=self.score,
                server=self.average,
            ),
            Phase(
                "digest",
                down=lambda t: {"indices": indices, "consensus": of_classes},
                up=lambda t: {},
                download=consensus,
                client=self.digest_and_revisit,
                server=lambda server, uploads, t: server,
            ),
        )

    # --- server -------------------------------------------------------------------------------------------------------
    def size(self, env: Env) -> int:
        """n, the public samples of a round."""
        return min(self.subset_size, len(public_of(env)))

    def subset(self, env: Env, round_: int) -> Tensor:
        """The public samples of a round, int32 `[n]`, none twice; fresh ones every round."""
        public = public_of(env)
        order = torch.randperm(len(public), generator=env.generator("public subset", round_))
        if self.variant == "official" if self.stratified is None else self.stratified:
            order = order[in_proportion(public.labels[order])]
        return order[: self.subset_size].to(env.device, torch.int32)

    def server_init(self, env: Env) -> State:
        return {"consensus": torch.zeros(self.size(env), env.spec.classes, device=env.device)}

    def average(self, server: State, uploads: Uploads, round_: int) -> State:
        return server | {"consensus": uploads.mean("logits")}

    # --- client -------------------------------------------------------------------------------------------------------
    def score(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        state = state or self.begin(ctx)
        ctx.model.load(state["model"], state["buffers"])
        logits = scores(ctx.model, public_of(ctx.env).x, down["indices"].long(), self.digest_batch_size)
        return state, Reply({"logits": logits}, self.weights[ctx.id % len(self.weights)] if self.weights else 1.0)

    def digest_and_revisit(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        state, model = state or self.begin(ctx), ctx.model
        model.load(state["model"], state["buffers"])
        digesting = adam_optimizer(model, ctx.local, self.digest_lr)
        revisiting = model_optimizer(model, ctx.local, learning_rate(ctx.local, ctx.round, ctx.env.rounds))
        digesting.restore(state.get("digest", {}))
        revisiting.restore(state.get("revisit", {}))
        loss = partial(logit_loss, kind=self.digest_loss, temperature=self.temperature)
        indices, consensus = down["indices"].long(), down["consensus"]
        digest(ctx, indices, consensus, loss, self.digest_epochs, self.digest_batch_size, digesting)
        local_training(ctx, optimizer=revisiting)
        state = {"model": model.parameters.detach().clone(), "buffers": model.buffers.clone()}
        if self.moments == "keep":
            state |= {"digest": digesting.state(), "revisit": revisiting.state()}
        return state, Reply({})

    def begin(self, ctx: ClientContext) -> State:
        """The model of the transfer learning, whose Adam on the private samples is the one that revisits them."""
        state = first_model(ctx)
        moments = state.pop("moments")
        go_on = self.moments == "keep" and ctx.local.optimizer == "adam"
        return state | ({"revisit": moments} if go_on else {})

    def client_predictor(self, state: State, env: Env, client: int) -> tuple[Tensor, Tensor]:
        return (state["model"], state["buffers"]) if state else env.initial(client)


def public_of(env: Env) -> PublicSet:
    """The job's public set, which `needs_public` asks for."""
    assert env.public is not None
    return env.public


def in_proportion(labels: Tensor) -> Tensor:
    """Positions of `labels` `[k]` in an order in which every beginning has each class in proportion, up to one.

    The i-th of the m samples of a class stands at (i + 1/2) / m of the whole.
    """
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        place[members] = (torch.arange(len(members)) + 0.5).double() / len(members)
    return place.argsort(stable=True)
