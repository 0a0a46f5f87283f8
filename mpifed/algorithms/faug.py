"""FAug, federated augmentation. Jeong, Oh, Kim, Park, Bennis, Kim: Communication-Efficient On-Device Machine Learning:
Federated Distillation and Augmentation under Non-IID Private Data, 2018, arXiv 1811.11479.

Before another algorithm, its base (`"fd"` and `"fedavg"` in the paper), begins, devices make their data less unequal.
Each finds its target labels, of which it has few samples, and uploads some of them as seeds, with seeds of redundant
labels to hide which are the targets. The server trains a conditional GAN on the seeds of all. Every device downloads
the generator, and tops up its target labels to the level of the others; the base then trains on both.

Departures. The paper's server multiplies the seeds by an image search on the web, which cannot be had: here seeds are
moved by a few pixels and made noisy. The paper says neither when a label is a target nor how far it is topped up; here,
one with fewer than `few` times an equal share, up to the mean of the labels that are not targets. Devices keep the
generated samples, which on MNIST are a tenth of the generator, and not the generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field as Range
from torch import Tensor

from mpifed.algorithms.base import (
    Absent,
    Algorithm,
    Auxiliary,
    ClientContext,
    Ensemble,
    Env,
    Field,
    Payload,
    Phase,
    Reply,
    State,
    Uploads,
)
from mpifed.algorithms.fedavg import FedAvg
from mpifed.learning.augmentation import Adversarial, generated, train_conditional_gan
from mpifed.learning.generation import refuse_texts
from mpifed.models.generators import faug_discriminator, faug_generator

Count = Annotated[int, Range(ge=1)]


@dataclass(frozen=True)
class FAug(Algorithm):
    """Server state: `base`. Device state: `base`, and the generated `samples` and their `labels`."""

    stateful: ClassVar[bool] = True

    base: Algorithm = FedAvg()
    """The algorithm that trains on the augmented samples."""
    few: Annotated[float, Range(gt=0, le=1)] = 0.1
    """A label is a target where a device has fewer samples of it than this times its samples over the classes."""
    seeds: Count = 5
    """At most so many seeds of each target label and of each redundant one."""
    redundant: Annotated[int, Range(ge=0)] = 0
    """Redundant labels of a device, random ones that are no targets; 0 in the paper's table."""
    stored: Literal["uint8", "float32"] = "uint8"
    """As what samples travel and are kept: pixels of 8 bit (the paper), or the model's input, for data that is no
    images."""
    steps: Count = 1000
    """Steps of the generator and of the discriminator."""
    batch_size: Annotated[int, Range(ge=2)] = 32
    """Of both; the generator's batch normalisation cannot train on one sample."""
    lr: Annotated[float, Range(gt=0)] = 2e-4
    noise: Count = 100
    """Length of the generator's noise."""
    shift: Annotated[int, Range(ge=0)] = 2
    """Oversampling: pixels by which seeds are moved at most."""
    jitter: Annotated[float, Range(ge=0)] = 0.05
    """Oversampling: standard deviation of the noise that is added, where samples are in [-1, 1]."""

    def check(self, local: Any) -> None:
        if self.base.pooled:
            raise ValueError("base: there is nothing to augment where all data is in one place")
        self.base.check(local)

    def check_models(self, env: Env, client: int) -> None:
        refuse_texts(env.spec, "faug")
        self.base.check_models(env, client)

    def phases(self, env: Env) -> tuple[Phase, ...]:
        """Two phases of all devices in round 1, and the base's, whose devices have more samples."""
        dtype = getattr(torch, self.stored)
        seeds = {"seeds": Field((None, *env.spec.input_shape), dtype), "seed_labels": Field((None,), torch.int16)}
        down = {
            "generator": Field((self.generator_size(env),)),
            "seed_labels": Field((env.spec.classes,), torch.uint8),
        }
        down |= {"extent": Field((2,))} if self.stored == "float32" else {}

        def download(server: State, round_: int) -> Payload:
            return {name: server[name] for name in down}

        def nothing(round_: int) -> Mapping[str, Field]:
            return {}

        learn = partial(self.learn, env)
        first = partial(Phase, clients="all", rounds=lambda t: t == 1)
        return (
            first("seeds", nothing, lambda t: seeds, lambda server, t: {}, self.send_seeds, learn),
            first("augment", lambda t: down, nothing, download, self.augment, self.forget),
            *(
                replace(
                    phase,
                    download=partial(self.of_base, phase),
                    client=partial(self.as_base, phase),
                    server=partial(self.serve, phase),
                )
                for phase in self.base.phases(env)
            ),
        )

    # --- device: seeds ------------------------------------------------------------------------------------------------
    def targets(self, ctx: ClientContext) -> tuple[Tensor, Tensor]:
        """Bool `[L]` each: the labels of which there are few samples, or none; and redundant ones."""
        share = ctx.examples / len(ctx.label_counts)
        targets = ctx.label_counts < self.few * share
        others = torch.nonzero(~targets).squeeze(1)
        chosen = others[torch.randperm(len(others), generator=ctx.generator("redundant labels"))[: self.redundant]]
        redundant = torch.zeros_like(targets)
        redundant[chosen] = True
        return targets, redundant

    def send_seeds(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        targets, redundant = self.targets(ctx)
        order = torch.randperm(ctx.examples, generator=ctx.generator("seeds"))
        labels = ctx.y.cpu()
        mine = [order[labels[order] == label][: self.seeds] for label in torch.nonzero(targets | redundant).squeeze(1)]
        chosen = torch.cat([*mine, order[:0]]).sort().values
        x = ctx.env.spec.pixels(ctx.x) if self.stored == "uint8" else ctx.x
        return state, Reply({"seeds": x[chosen.to(x.device)], "seed_labels": labels[chosen].to(torch.int16)})

    # --- server: generator --------------------------------------------------------------------------------------------
    def server_init(self, env: Env) -> State:
        return {"base": self.base.server_init(env)}

    def generator(self, env: Env) -> Auxiliary:
        factory = partial(faug_generator, self.noise, env.spec.classes, env.spec.input_shape)
        return env.auxiliary("faug generator", factory)

    def generator_size(self, env: Env) -> int:
        """How many numbers the generator is, running statistics included; most ranks need no more than that yet."""
        with torch.device("meta"):
            module = faug_generator(self.noise, env.spec.classes, env.spec.input_shape)
        numbers = (*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point()))
        return sum(tensor.numel() for tensor in numbers)

    def learn(self, env: Env, server: State, uploads: Uploads, round_: int) -> State:
        seeds, labels = (torch.cat(list(uploads.each(name))) for name in ("seeds", "seed_labels"))
        generator, labels = self.generator(env), labels.long()
        known = torch.bincount(labels, minlength=env.spec.classes) > 0
        extent = torch.tensor([0.0, 255.0], device=env.device)
        parameters, buffers = generator.parameters, generator.buffers
        if len(seeds):
            if self.stored == "float32":
                extent = torch.stack([seeds.min(), seeds.max()])
            factory = partial(faug_discriminator, env.spec.classes, env.spec.input_shape)
            discriminator = env.auxiliary("faug discriminator", factory)
            settings = Adversarial(self.steps, self.batch_size, self.lr, self.noise, self.shift, self.jitter)
            scaled = 2 * (seeds.float() - extent[0]) / (extent[1] - extent[0]).clamp(min=1e-6) - 1
            random = env.generator("faug")
            parameters, buffers = train_conditional_gan(generator, discriminator, scaled, labels, settings, random)
        return server | {
            "generator": torch.cat([parameters, buffers]),
            "seed_labels": known.to(torch.uint8),
            "extent": extent,
        }

    def forget(self, server: State, uploads: Uploads, round_: int) -> State:
        return {"base": server["base"]}

    # --- device: more samples -----------------------------------------------------------------------------------------
    def augment(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        targets, redundant = self.targets(ctx)
        known = down["seed_labels"].bool().cpu()
        level = ctx.label_counts[~targets].double().mean().round().long()
        missing = torch.where(targets & known, level - ctx.label_counts, 0).clamp(min=0)
        labels = torch.repeat_interleave(torch.arange(len(missing)), missing).to(ctx.y.device)
        generator, low, high = self.generator(ctx.env).model, *down.get("extent", torch.tensor([0.0, 255.0]))
        generator.load(*down["generator"].split([generator.parameters.numel(), generator.buffers.numel()]))
        samples = generated(generator, labels, self.noise, ctx.generator("generated samples"))
        samples = low + (samples + 1) / 2 * (high - low)
        if self.stored == "uint8":
            samples = samples.round().to(torch.uint8)
        self.log_leakage(targets & (ctx.label_counts > 0), redundant, known, ctx)
        ctx.log("generated", len(labels))
        return state | {"samples": samples, "labels": labels}, Reply({})

    def log_leakage(self, sent: Tensor, redundant: Tensor, known: Tensor, ctx: ClientContext) -> None:
        """The paper's two measures of privacy leakage: of a device's targets to the server, |T_i| / (|T_i| + |R_i|),
        and to the other devices, |T_i| over the number of labels that anybody sent."""
        targets, hidden, everybody = (int(labels.sum()) for labels in (sent, redundant, known))
        ctx.log("leakage_to_server", targets / max(1, targets + hidden))
        ctx.log("leakage_to_devices", targets / max(1, everybody))

    def with_more(self, state: State, ctx: ClientContext) -> ClientContext:
        """The device with its generated samples."""
        if "samples" not in state or len(state["labels"]) == 0:
            return ctx
        more: Any = copy(ctx)
        more.x = torch.cat([ctx.x, ctx.env.spec.standardise(state["samples"])])
        more.y = torch.cat([ctx.y, state["labels"]])
        more.examples = len(more.y)
        more.relative_examples = ctx.relative_examples * more.examples / ctx.examples
        more.label_counts = torch.bincount(more.y.cpu(), minlength=len(ctx.label_counts))
        return more

    # --- the base -----------------------------------------------------------------------------------------------------
    def client_init(self, env: Env, client: int) -> State:
        return {"base": self.base.client_init(env, client)}

    def of_base(self, phase: Phase, server: State, round_: int) -> Payload:
        return phase.download(server["base"], round_)

    def as_base(self, phase: Phase, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        base, answer = phase.client(state["base"], down, self.with_more(state, ctx))
        return state | {"base": base}, answer

    def serve(self, phase: Phase, server: State, uploads: Uploads, round_: int) -> State:
        return server | {"base": phase.server(server["base"], uploads, round_)}

    def sent(self, server: State, down: Payload, round_: int) -> State:
        """Of what the base sent; it has sent nothing where the download is FAug's or empty."""
        if not down or "seed_labels" in down:
            return server
        return server | {"base": self.base.sent(server["base"], down, round_)}

    def acknowledged(self, before: State, after: State, down: Payload, sent: Payload) -> State:
        if "seeds" in sent:
            return after
        return after | {"base": self.base.acknowledged(before["base"], after["base"], down, sent)}

    @property
    def evaluates(self) -> Literal["server", "clients", "both"]:  # type: ignore[override]
        return self.base.evaluates

    @property
    def needs_public(self) -> bool:  # type: ignore[override]
        return self.base.needs_public

    @property
    def needs_client_models(self) -> bool:  # type: ignore[override]
        return self.base.needs_client_models

    @property
    def begins_with_transfer(self) -> bool:  # type: ignore[override]
        return self.base.begins_with_transfer

    def predictor(self, server: State, env: Env) -> tuple[Tensor, Tensor] | Ensemble:
        return self.base.predictor(server["base"], env)

    def received(self, state: State, down: Payload, env: Env, client: int) -> tuple[Tensor, Tensor]:
        """In round 1, whose first download is none, a server's model is the initial one."""
        if not down and self.evaluates == "server":
            return env.initial()
        return self.base.received(state["base"], down, env, client)

    def client_predictor(self, state: State, env: Env, client: int) -> tuple[Tensor, Tensor]:
        return self.base.client_predictor(state["base"], env, client)
