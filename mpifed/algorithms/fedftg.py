"""FedFTG. Zhang, Shen, Ding, Tao, Duan: Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID
Federated Learning, CVPR 2022, arXiv 2203.09249, Algorithm 2.

On top of an algorithm that makes one model of the clients' (FedAvg, FedProx, FedDyn, SCAFFOLD, ...): after the base's
round the server fine-tunes that model on images from a generator of its own, with the round's client models as
teachers. Generator and model play against each other: the one looks for images of a wanted label on which the model
and its teachers disagree (hard samples), the other learns to agree with the teachers, who weigh for a class as many
samples of it as they have. Clients do what the base says, and upload their class counts besides. The generator never
leaves the server.

The paper's text was not at hand in full when this was written: equations by way of the authors' code and of papers that
quote it. `variant` sets every switch to the paper's (`"paper"`) or to the authors' code's (`"official"`) meaning; a
switch that is given wins. Fine-tuning changes the base's `model` and running statistics only: SCAFFOLD's control
variates and FedDyn's memories are differences to the model that was *sent*, which is the fine-tuned one (the authors'
SCAFFOLD takes the un-tuned average instead, though clients start from the tuned one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import Field as Range
from torch import Tensor, nn

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
from mpifed.algorithms.teachers import client_models, one_by_one, with_own_buffers
from mpifed.algorithms.variants import OF_VARIANT, Variants, settle
from mpifed.learning.distillation import ensemble_logits
from mpifed.learning.fine_tuning import Settings, label_batches, train_generator, train_student
from mpifed.learning.generation import draw_noise, label_weights, refuse_texts
from mpifed.learning.local import Adam, Plain, Sgd, parts_of
from mpifed.models.generators import image_generator, latent_generator

Count = Annotated[int, Range(ge=0)]
Positive = Annotated[float, Range(gt=0)]
Weight = Annotated[float, Range(ge=0)]


VARIANTS: Variants = {
    "paper": {
        "discrepancy": "kl",
        "teacher_gradient": True,
        "fidelity_weighting": "sample",
        "diversity": "norm",
        "generator_update": "joint",
        "student_reduction": "batch",
        "labels": "sampled",
        "batch_norm": "train",
    },
    "official": {
        "discrepancy": "l1",
        "teacher_gradient": False,
        "fidelity_weighting": "mean",
        "diversity": "mean",
        "generator_update": "per_client",
        "student_reduction": "element",
        "labels": "proportional",
        "batch_norm": "train",
    },
}


@dataclass(frozen=True)
class FedFTG(Algorithm):
    """Server state: `base`, the base's; `generator` `[g]` and `generator_buffers`. Client states are the base's."""

    base: Algorithm = FedAvg()
    """Whose round it is. In a job: a name, or a table with the base's own hyper-parameters."""
    variant: Literal["paper", "official"] = "official"
    """What the switches mean that are left out. The authors' code is what is known for certain, and what keeps the
    bases' accuracy (docs/algorithms/fedftg.md)."""

    # the game (I, I_g, I_d and B of Algorithm 2)
    iterations: Count = 10
    """Batches of noise and labels in a round; 0 is the base bit for bit."""
    generator_steps: Annotated[int, Range(ge=1)] = 1
    """Updates of the generator for each of them."""
    student_steps: Annotated[int, Range(ge=1)] = 5
    """Updates of the model for each of them."""
    batch_size: Annotated[int, Range(ge=2)] = 50
    noise: Annotated[int, Range(ge=1)] = 100
    """Length of the generator's noise, standard normal; 100 for ten classes, 256 for a hundred (authors' code)."""
    channels: Annotated[int, Range(ge=1)] = 64
    """Width of the generator: channels for images, units for inputs that are none."""
    generator_lr: Positive = 0.01
    """Adam's, times `lr_decay` every round. The optimisers are new every round (authors' code)."""
    student_lr: Positive = 0.1
    """SGD's, times `lr_decay` every round."""
    lr_decay: Annotated[float, Range(gt=0, le=1)] = 0.998
    student_weight_decay: Weight = 1e-3
    fidelity_weight: Weight = 1.0
    """lambda_cls: teachers recognise the label."""
    diversity_weight: Weight = 1.0
    """lambda_dis: images of a batch differ as their noise does."""

    # the switches, in the paper's | the authors' code's meaning
    discrepancy: Literal["kl", "l1"] = OF_VARIANT
    """kl | l1: what the generator maximises, KL of the outputs or mean absolute difference of the logits."""
    teacher_gradient: bool = OF_VARIANT
    """true | false: the generator's gradient of the discrepancy goes through the teachers too."""
    fidelity_weighting: Literal["sample", "mean"] = OF_VARIANT
    """sample | mean: the teachers' cross-entropy weighed sample by sample, or its mean by the mean weight."""
    diversity: Literal["norm", "mean"] = OF_VARIANT
    """norm | mean: distances of the diversity loss, Euclidean norms (equation 7), or mean absolute and mean squared."""
    generator_update: Literal["joint", "per_client"] = OF_VARIANT
    """joint | per_client: one step on the sum over the teachers, or one for each in turn."""
    student_reduction: Literal["batch", "element"] = OF_VARIANT
    """batch | element: the student's loss is a mean over the batch, or over batch and classes."""
    labels: Literal["sampled", "proportional"] = OF_VARIANT
    """sampled | proportional: how the round's labels follow the class counts."""
    batch_norm: Literal["train", "restored", "frozen"] = OF_VARIANT
    """train | train: batch normalisation of the student on generated images. `train`: running statistics move to theirs
    (the authors' code); `restored`: batch statistics while training, the clients' running ones afterwards; `frozen`:
    the clients' running ones throughout."""

    def __post_init__(self) -> None:
        settle(self, VARIANTS)

    def check(self, local: Any) -> None:
        if self.base.evaluates != "server" or type(self.base).phases is not Algorithm.phases:
            raise ValueError(
                f"base: FedFTG fine-tunes the one model of a round, and {type(self.base).__name__} has none"
            )
        self.base.check(local)

    def check_models(self, env: Env, client: int) -> None:
        refuse_texts(env.spec, "fedftg")
        self.base.check_models(env, client)

    @property
    def settings(self) -> Settings:
        """Of the two players."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    # --- what crosses the network: the base's, with every client's model by itself ------------------------------------
    def down(self, env: Env) -> Mapping[str, Field]:
        return self.base.down(env)

    def up(self, env: Env) -> Mapping[str, Field]:
        return dict(one_by_one(self.base.up(env), env)) | {"class_counts": Field((env.spec.classes,), torch.int32)}

    # --- client: the base's, and its class counts ---------------------------------------------------------------------
    def client_init(self, env: Env, client: int) -> State:
        return self.base.client_init(env, client)

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        state, answer = self.base.client(state, down, ctx)
        answer = with_own_buffers(answer, down, ctx)
        if isinstance(answer, Reply):
            answer = replace(answer, upload=answer.upload | {"class_counts": ctx.label_counts.to(torch.int32)})
        return state, answer

    # --- server -------------------------------------------------------------------------------------------------------
    def server_init(self, env: Env) -> State:
        generator = self.generator(env)
        return {
            "base": self.base.server_init(env),
            "generator": generator.parameters,
            "generator_buffers": generator.buffers,
        }

    def download(self, server: State, round_: int) -> Payload:
        return self.base.download(server["base"], round_)

    def sent(self, server: State, down: Payload, round_: int) -> State:
        return server | {"base": self.base.sent(server["base"], down, round_)}

    def server_step(self, env: Env, server: State, uploads: Uploads, round_: int) -> State:
        """The base's step, and then the fine-tuning of its model."""
        base = self.base.server(server["base"], uploads, round_)
        if self.iterations == 0:
            return server | {"base": base}
        teachers = client_models(self.base.download(server["base"], round_), uploads, env)
        counts = torch.stack(list(uploads.each("class_counts"))).cpu()
        tuned, generator = self.fine_tune(env, server, base, teachers, counts, round_)
        return server | {"base": base | tuned} | generator

    def fine_tune(
        self,
        env: Env,
        server: State,
        base: State,
        clients: tuple[Tensor, Tensor],
        counts: Tensor,
        round_: int,
    ) -> tuple[State, State]:
        """Algorithm 2 after its aggregation: the tuned model (and running statistics), and the generator's next state.

        `clients`: the teachers' parameters `[K, d]` and buffers `[K, b]`; `counts` `[K, C]`.
        """
        settings, random = self.settings, env.generator("fine-tuning", round_)
        alpha = label_weights(counts)  # [K, C], the class-level ensemble of equation 10
        student, generator = env.model(), self.generator(env).model
        student.load(base["model"], base.get("buffers", clients[1].mean(dim=0)))
        generator.load(server["generator"], server["generator_buffers"])
        decay = self.lr_decay ** (round_ - 1)
        sgd = Sgd(parts_of(student), Plain(self.student_weight_decay), self.student_lr * decay)
        adam = Adam(parts_of(generator), Plain(), self.generator_lr * decay)

        def generate(noise: Tensor, labels: Tensor) -> Tensor:
            return generator.module(noise, labels).view(-1, *env.spec.input_shape)

        def teachers(images: Tensor, some: slice = slice(None)) -> Tensor:
            return ensemble_logits(student, clients[0][some], clients[1][some], images)

        for labels in label_batches(counts, self.iterations, self.batch_size, self.labels, random):
            noise = draw_noise("normal", self.batch_size, self.noise, random).to(env.device)
            weights, labels = alpha[:, labels].to(env.device), labels.to(env.device)
            for _ in range(self.generator_steps):
                generator.train()
                train_generator(
                    generate,
                    list(generator.module.parameters()),
                    adam,
                    student,
                    teachers,
                    noise,
                    labels,
                    weights,
                    settings,
                )
            generator.eval()
            with torch.no_grad():
                images = generate(noise, labels)
                target = (weights[:, :, None] * teachers(images).softmax(dim=2)).sum(dim=0)
            train_student(student, sgd, images, target, self.student_steps, settings)
        tuned = {"model": student.parameters.detach().clone()}
        if "buffers" in base:
            tuned["buffers"] = student.buffers.clone()
        return tuned, {
            "generator": generator.parameters.detach().clone(),
            "generator_buffers": generator.buffers.clone(),
        }

    def generator(self, env: Env) -> Auxiliary:
        """The image generator of the authors' code, or, for inputs that are no images, a layer of `channels` units."""
        shape, classes = env.spec.input_shape, env.spec.classes

        def factory() -> nn.Module:
            if len(shape) == 3 and shape[1] % 4 == shape[2] % 4 == 0:
                return image_generator(self.noise, classes, (shape[0], shape[1], shape[2]), channels=self.channels)
            return latent_generator(self.noise, classes, self.channels, prod(shape))

        return env.auxiliary("generator", factory)

    def phases(self, env: Env) -> tuple[Phase, ...]:
        down, up = self.down(env), self.up(env)
        server = partial(self.server_step, env)
        return (Phase("train", lambda t: down, lambda t: up, self.download, self.client, server),)

    # --- what is the base's to say ------------------------------------------------------------------------------------
    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return self.base.stateful

    def acknowledged(self, before: State, after: State, down: Payload, sent: Payload) -> State:
        return self.base.acknowledged(before, after, down, sent)

    def predictor(self, server: State, env: Env) -> tuple[Tensor, Tensor] | Ensemble:
        return self.base.predictor(server["base"], env)

    def received(self, state: State, down: Payload, env: Env, client: int) -> tuple[Tensor, Tensor]:
        return self.base.received(state, down, env, client)
