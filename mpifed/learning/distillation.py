"""Distillation: losses between a student's logits and soft targets, and the logits of many models at once.

Letters of shapes: K models, B samples, C classes, d parameters and b buffers of a model. All losses are means over the
samples, in nats where they are entropies, and differentiable in whatever they are given: detach what is a target.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, for the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap

from mpifed.algorithms.base import Model
from mpifed.learning.local import Adam, Plain, parts_of

LogitLoss = Literal["l1", "mse", "kl"]


# --- losses -----------------------------------------------------------------------------------------------------------
def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits `[..., C]`, mean over all samples; a scalar.

    T^2 keeps the gradient's size as T grows (Hinton et al., section 2.1), when the loss becomes half the mean squared
    difference of the logits, each centred over its classes.
    """
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    log_student = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1).mean()


def soft_cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the student's logits `[..., C]` to probabilities `target` of that shape, mean over all samples.

    It is KL(target || softmax(student)) plus the entropy of the target, so the same gradient in the student.
    """
    return -(target * F.log_softmax(student, dim=-1)).sum(dim=-1).mean()


def logit_loss(student: Tensor, teacher: Tensor, kind: LogitLoss, temperature: float = 1.0) -> Tensor:
    """The loss that a job names: `l1` or `mse` on the logits (mean over samples and classes), or `kl_divergence`."""
    if kind == "kl":
        return kl_divergence(student, teacher, temperature)
    return F.l1_loss(student, teacher) if kind == "l1" else F.mse_loss(student, teacher)


# --- many models of one architecture ----------------------------------------------------------------------------------
def ensemble_logits(
    model: Model,
    parameters: Tensor,
    buffers: Tensor,
    x: Tensor,
    *,
    batched: bool | None = None,
) -> Tensor:
    """The logits `[K, B, C]` of K models of `model`'s architecture, of which nothing is loaded or changed.

    `parameters` `[K, d]` and `buffers` `[K, b]` (running statistics), resident on the device of `x` `[B, ...]`. In
    evaluation mode, each with its own running statistics; `model`'s mode is restored. Differentiable in `x` and in
    `parameters`.

    `batched` runs the K forward passes as one (`vmap`); by default on an accelerator, where launching K times is what
    costs. On a CPU it would make grouped convolutions of convolutions, which are up to three times slower than a loop.
    An architecture that cannot be batched is looped over.
    """

    def one(parameters: Tensor, buffers: Tensor) -> Tensor:
        named = model.layout.views(parameters) | model.buffer_layout.views(buffers)
        return functional_call(model.module, named, (x,))

    modes = [(part, part.training) for part in model.module.modules()]
    model.eval()
    try:
        if x.is_cuda if batched is None else batched:
            try:
                return vmap(one)(parameters, buffers)
            except RuntimeError:  # an operation that vmap does not know; what is wrong otherwise, the loop raises again
                pass
        return torch.stack([one(*member) for member in zip(parameters, buffers, strict=True)])
    finally:
        for part, training in modes:
            part.training = training


def distil(
    student: Model,
    teacher: Callable[[Tensor], Tensor],
    inputs: Callable[[Tensor], Tensor],
    samples: Tensor,
    held_out: Tensor,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    patience: int,
    measure_every: int,
    random: torch.Generator,
) -> int:
    """Train the loaded `student`, in the mode that it is in, to answer as `teacher` does; returns the steps made.

    Minimises KL(softmax(teacher(x)) || softmax(student(x))) by Adam, `lr` falling to 0 over `steps` by half a cosine.
    Every `measure_every` steps the same loss is measured on the held-out samples (the student in evaluation mode);
    after `patience` steps without an improvement it stops. The student ends as it was when that loss was least, be it
    at the start.

    `inputs(indices int64 [B])` -> model input `[B, ...]`; `samples` and `held_out` are indices. The teacher answers
    each sample once, whatever the number of passes.
    """
    targets, measured = (answers_of(teacher, inputs, indices, batch_size) for indices in (samples, held_out))

    def disagreement() -> float:
        training = student.training
        student.eval()
        losses = [
            float(kl_divergence(student(inputs(part)), answers)) * len(part)
            for part, answers in zip(held_out.split(batch_size), measured.split(batch_size), strict=True)
        ]
        student.train(training)
        return sum(losses) / len(held_out)

    def copy() -> tuple[Tensor, Tensor]:
        return student.parameters.detach().clone(), student.buffers.clone()

    optimizer = Adam(parts_of(student), Plain(), lr)
    with torch.no_grad():
        least, best, best_at = disagreement(), copy(), 0
    order, step = torch.empty(0, dtype=torch.int64), 0
    while step < steps and step - best_at < patience:
        if len(order) < min(batch_size, len(samples)):
            order = torch.randperm(len(samples), generator=random)
        batch, order = order[:batch_size], order[batch_size:]
        optimizer.rate = lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        student.drop_gradient()
        kl_divergence(student(inputs(samples[batch])), targets[batch.to(targets.device)]).backward()
        optimizer.step(student.gradients())
        step += 1
        if step % measure_every == 0 or step == steps:
            with torch.no_grad():
                now = disagreement()
            if now < least:
                least, best, best_at = now, copy(), step
    student.load(*best)
    return step


def answers_of(
    teacher: Callable[[Tensor], Tensor], inputs: Callable[[Tensor], Tensor], indices: Tensor, batch_size: int
) -> Tensor:
    """The logits `[k, C]` of `teacher` on the samples `inputs(indices)`, `indices` int64 `[k]`, without gradients."""
    with torch.no_grad():
        return torch.cat([teacher(inputs(part)) for part in indices.split(batch_size)])
