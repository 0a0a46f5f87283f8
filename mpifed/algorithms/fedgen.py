"""FedGen. Zhu, Hong, Zhou: Data-Free Knowledge Distillation for Heterogeneous Federated Learning, ICML 2021, arXiv
2105.10056, Algorithm 1; and the authors' code, github.com/zhuangdizhu/FedGen.

The server learns a generator G(noise, label) of latent representations that the clients' heads, together, take for that
label, and sends it along with the model. A client regularises its training with it: its head has to know generated
representations of labels that the client may never have seen. Server and clients share all of the model, or (`share =
"head"`) its last layer alone.

Paper and code differ in almost every term, and the published gains cannot be tied to the paper's objective: `variant`
sets every switch to the paper's or (the default) the code's meaning, and a switch that is given wins. Left out of the
code: batches sorted by class in the published version, a learning rate that depends on when a client last took part,
the union of all clients' labels known beforehand (here the labels that were uploaded so far), and running statistics of
batch normalisation that never reach the server (`model.buffers = "local"`; with "both" they are averaged besides, so
that the server's model can be tested).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field as Range
from torch import Tensor

from mpifed.algorithms.base import (
    Absent,
    Auxiliary,
    ClientContext,
    Each,
    Env,
    Field,
    Payload,
    Phase,
    Reply,
    State,
    Uploads,
)
from mpifed.algorithms.fedavg import FedAvg, averaged_buffers
from mpifed.algorithms.variants import OF_VARIANT, Variants, settle
from mpifed.learning.generation import Noise, label_prior, label_weights
from mpifed.learning.latent import EnsembleLoss, GeneratorLoss, Heads, RegularisedLoss, train_generator
from mpifed.learning.local import Adam, Plain, parts_of
from mpifed.models.classifier import Parts, split
from mpifed.models.generators import latent_generator

Count = Annotated[int, Range(ge=0)]
Positive = Annotated[int, Range(ge=1)]
Weight = Annotated[float, Range(ge=0)]
Decay = Annotated[float, Range(gt=0, le=1)]

VARIANTS: Variants = {
    "paper": {
        "weighting": "uniform",
        "generated_weight": 1.0,
        "latent_kl_weight": 0.0,
        "decay": 1.0,
        "regularised_steps": 0,
        "labels": "prior",
        "counts": "held",
        "smoothing": 0.0,
        "ensemble": "mean_logits",
        "noise": "normal",
        "order": "aggregate_first",
    },
    "official": {
        "weighting": "examples",
        "generated_weight": 10.0,
        "latent_kl_weight": 10.0,
        "decay": 0.98,
        "regularised_steps": 20,
        "labels": "uniform",
        "counts": "seen",
        "smoothing": 1.0,
        "ensemble": "weighted_ce",
        "noise": "uniform",
        "order": "generator_first",
    },
}


@dataclass(frozen=True)
class FedGen(FedAvg):
    """Server state: FedAvg's `model` `[d]` and `buffers`, or `head` `[h]` alone; `generator` `[g]` and
    `generator_statistics`, its `optimizer` (Adam's moments), and `label_counts` `[classes]`,
    to which p(y) is proportional: whole numbers, which no codec touches.

    Clients keep nothing, or, where only heads are shared, `body` `[d - h]`, the last `head` and `buffers`.
    """

    variant: Literal["paper", "official"] = "official"
    """What the switches mean that are left out."""
    share: Literal["all", "head"] = "all"
    """What server and clients exchange of the model; with `head` every client keeps its own feature extractor."""

    # the switches: paper | official
    weighting: Literal["examples", "uniform"] = OF_VARIANT
    """uniform | examples: weight of a client in the mean of the models."""
    generated_weight: Weight = OF_VARIANT
    """1 | 10: weight of the head's cross-entropy on generated representations (alpha in the code)."""
    latent_kl_weight: Weight = OF_VARIANT
    """0 | 10: weight of KL(head on a generated representation of the label || model on the sample), which the paper
    does not have (beta in the code; 1 for EMNIST)."""
    decay: Decay = OF_VARIANT
    """1 | 0.98: factor of both weights every round (down to 0.0001)."""
    regularised_steps: Count = OF_VARIANT
    """0 | 20: local steps that are regularised; 0 is all."""
    labels: Literal["prior", "uniform"] = OF_VARIANT
    """prior | uniform: generated labels follow the round's label counts, or are uniform over those that occur."""
    counts: Literal["held", "seen"] = OF_VARIANT
    """held | seen: a client uploads the counts of its training labels, or of those in its mini-batches of the round."""
    smoothing: Weight = OF_VARIANT
    """0 | 1: added to every count, so that a client without samples of a label has some say about it."""
    ensemble: EnsembleLoss = OF_VARIANT
    """mean_logits | weighted_ce: the generator's loss is the cross-entropy of the heads' mean logits, or the sum of
    their cross-entropies, weighted by label count. Or `mean_weight_ce`: to the letter of the authors' code, whose
    weights are averaged over the batch before they weigh anything."""
    noise: Noise = OF_VARIANT
    """normal | uniform: the generator's noise."""
    order: Literal["aggregate_first", "generator_first"] = OF_VARIANT
    """aggregate_first | generator_first: makes a difference with `student_weight` alone."""

    # the generator
    noise_size: Positive = 32
    """Length of the noise."""
    hidden: Positive = 256
    """Units of the generator's hidden layer."""
    embedding: bool = False
    """A learned vector stands for the label, not a one-hot one."""
    generator_steps: Count = 50
    """Updates of the generator in a round, each on a new batch."""
    generator_batch: Annotated[int, Range(ge=2)] = 32
    """Batch of the generator's updates."""
    generator_lr: Annotated[float, Range(gt=0)] = 3e-4
    """Step size of the generator's Adam, whose moments last from round to round (1e-4 for EMNIST in the code)."""
    generator_lr_decay: Decay = 0.98
    """Factor of that step size every round."""
    generator_weight_decay: Weight = 0.01
    """L2 penalty of the generator."""
    teacher_weight: Weight = 1.0
    """Weight of the ensemble's loss in the generator's (eta_alpha in the code)."""
    student_weight: Weight = 0.0
    """Weight of the disagreement of ensemble and global head that the generator seeks; the code has it, and 0."""
    diversity_weight: Weight = 1.0
    """Weight of the diversity loss."""
    synthetic_batch: Count = 0
    """Generated samples beside each local batch; 0: as many as `local.batch_size`."""

    def __post_init__(self) -> None:
        settle(self, VARIANTS)

    @property
    def evaluates(self) -> Literal["server", "clients", "both"]:  # type: ignore[override]
        """There is no global model where only heads are shared."""
        return "server" if self.share == "all" else "clients"

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return self.share == "head"

    # --- what crosses the network -------------------------------------------------------------------------------------
    def generates(self, round_: int) -> bool:
        """In round 1 the generator has learned nothing, and is not sent."""
        return round_ > 1 and (self.generated_weight > 0 or self.latent_kl_weight > 0)

    def fields_down(self, env: Env, round_: int) -> Mapping[str, Field]:
        fields = dict(super().down(env))
        if self.share == "head":
            layout = self.parts(env).head_layout
            fields = {"head": Field((layout.size,), layout=layout)}
        if self.generates(round_):
            generator = self.generator(env).model
            fields["generator"] = Field((generator.layout.size,), layout=generator.layout)
            # evaluation mode needs the running statistics
            fields["generator_statistics"] = Field((generator.buffer_layout.size,), layout=generator.buffer_layout)
            fields["label_counts"] = Field((env.spec.classes,), torch.int32)
        return fields

    def up(self, env: Env) -> Mapping[str, Field]:
        """Only heads travel one by one; bodies may be added up on the way."""
        fields, parts = dict(super().up(env)), self.parts(env)
        fields.pop("update")
        body = {"body_update": Field((parts.body_layout.size,), reduce=self.mean, layout=parts.body_layout)}
        if self.share == "head":
            fields, body = {}, {}
        head = Field((parts.head_layout.size,), reduce=Each(self.mean.weights), layout=parts.head_layout)
        return body | {"head_update": head} | fields | {"label_counts": Field((env.spec.classes,), torch.int32)}

    def phases(self, env: Env) -> tuple[Phase, ...]:
        first, later, up = self.fields_down(env, 1), self.fields_down(env, 2), self.up(env)

        server = partial(self.server_step, env)
        return (Phase("train", lambda t: later if t > 1 else first, lambda t: up, self.download, self.client, server),)

    # --- server: send -------------------------------------------------------------------------------------------------
    def server_init(self, env: Env) -> State:
        server = super().server_init(env)
        if self.share == "head":
            server = {"head": self.parts(env).head(server["model"]).clone()}
        _, parameters, buffers = self.generator(env)
        return server | {
            "generator": parameters.clone(),
            "generator_statistics": buffers.clone(),
            "optimizer": {"mean": parameters * 0, "square": parameters * 0, "steps": torch.zeros(())},
            "label_counts": torch.zeros(env.spec.classes, dtype=torch.int32),
        }

    def download(self, server: State, round_: int) -> Payload:
        generated = ("generator", "generator_statistics", "label_counts") if self.generates(round_) else ()
        return {name: server[name] for name in ("head", "model", "buffers", *generated) if name in server}

    # --- client -------------------------------------------------------------------------------------------------------
    def client_init(self, env: Env, client: int) -> State:
        if self.share == "all":
            return {}
        model = env.initial(client)[0]
        return {"body": self.parts(env).body(model), "head": self.parts(env).head(model)}

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        parts, loss = self.parts(ctx.env), self.objective(down, ctx)
        if self.share == "head":
            down = down | {"model": parts.join(state["body"], down["head"])}
        state, _ = self.train(state, down, ctx, objective=loss)
        counts = loss.seen(ctx.env.spec.classes) if self.counts == "seen" else ctx.label_counts
        upload = self.update(down, ctx)
        update = upload.pop("update")
        upload |= {"head_update": parts.head(update), "label_counts": counts.to(torch.int32)}
        if self.share == "all":
            upload["body_update"] = parts.body(update)
        else:
            model = ctx.model.parameters.detach()
            state = state | {"body": parts.body(model), "head": parts.head(model)}
        return state, Reply(upload, weight=ctx.examples)

    def objective(self, down: Payload, ctx: ClientContext) -> RegularisedLoss:
        """The client's loss in this round (equation 5)."""
        generator = None
        if "generator" in down:
            generator = self.generator(ctx.env).model
            generator.load(down["generator"], down["generator_statistics"])
            generator.eval()
        size = self.synthetic_batch or ctx.local.batch_size
        return RegularisedLoss(
            split,
            generator,
            label_prior(down["label_counts"][None]) if generator is not None else torch.empty(0),
            self.scheduled(self.generated_weight, ctx.round) * size / ctx.local.batch_size,
            self.scheduled(self.latent_kl_weight, ctx.round),
            self.regularised_steps,
            size,
            (self.noise, self.noise_size),
            ctx.generator("generated samples"),
        )

    def scheduled(self, weight: float, round_: int) -> float:
        """A weight of the first round in this one; what is 0 stays 0."""
        return max(1e-4, weight * self.decay ** (round_ - 1)) if weight else 0.0

    # --- server: receive ----------------------------------------------------------------------------------------------
    def server_step(self, env: Env, server: State, uploads: Uploads, round_: int) -> State:
        parts = self.parts(env)
        sent = server["head"] if self.share == "head" else parts.head(server["model"])
        heads = sent + torch.stack(list(uploads.each("head_update")))  # [K, h], theta_k^p
        head_step = self.server_lr * uploads.mean("head_update")
        if self.share == "head":
            averaged: State = {"head": sent + head_step}
        else:
            step = parts.join(self.server_lr * uploads.mean("body_update"), head_step)
            averaged = {"model": server["model"] + step} | averaged_buffers(server, uploads)
        student = sent if self.order == "generator_first" else sent + head_step

        counts = torch.stack(list(uploads.each("label_counts")))
        held = counts.sum(dim=0) > 0
        if self.labels == "prior":
            known, wanted = counts.sum(dim=0), label_prior(counts)
        else:  # uniform over the labels of this round at the server, and over all that were ever uploaded at clients
            known, wanted = (server["label_counts"] > 0) | held, held.to(torch.float32)
        return (
            server
            | averaged
            | self.train_generator(env, server, heads, counts, student, wanted, round_)
            | {"label_counts": known.to(torch.int32)}
        )

    def train_generator(
        self, env: Env, server: State, heads: Tensor, counts: Tensor, student: Tensor, prior: Tensor, round_: int
    ) -> State:
        """The generator's next state, having learned from the heads `[K, h]` of the round (equation 4)."""
        model = self.generator(env).model
        model.load(server["generator"], server["generator_statistics"])
        adam = Adam(parts_of(model), Plain(self.generator_weight_decay), self.scheduled_lr(round_))
        adam.restore(server["optimizer"])
        linear = self.parts(env).linear
        train_generator(
            model,
            adam,
            GeneratorLoss(self.ensemble, self.teacher_weight, self.student_weight, self.diversity_weight),
            Heads(*linear(heads)),
            label_weights(counts, self.smoothing),
            Heads(*linear(student[None])),
            prior,
            steps=self.generator_steps,
            batch_size=self.generator_batch,
            noise=(self.noise, self.noise_size),
            random=env.generator("generator", round_),
        )
        return {
            "generator": model.parameters.detach().clone(),
            "generator_statistics": model.buffers.clone(),
            "optimizer": adam.state(),
        }

    def scheduled_lr(self, round_: int) -> float:
        return self.generator_lr * self.generator_lr_decay ** (round_ - 1)

    # --- models -------------------------------------------------------------------------------------------------------
    def parts(self, env: Env) -> Parts:
        """Where the model's head is."""
        return Parts.of(env.model().module, env.model().layout)

    def generator(self, env: Env) -> Auxiliary:
        """The generator of representations that this model's head takes."""
        _, head = split(env.model().module)
        return env.auxiliary(
            "generator",
            lambda: latent_generator(
                self.noise_size, env.spec.classes, self.hidden, head.in_features, embedding=self.embedding
            ),
        )

    # --- evaluation, where only heads are shared ----------------------------------------------------------------------
    def received(self, state: State, down: Payload, env: Env, client: int) -> tuple[Tensor, Tensor]:
        if self.share == "head":
            state = state | {"head": down["head"]}
        return super().received(state, down, env, client)

    def client_predictor(self, state: State, env: Env, client: int) -> tuple[Tensor, Tensor]:
        buffers = state.get("buffers", env.initial(client)[1])
        return self.parts(env).join(state["body"], state["head"]), buffers
