"""Distillation: losses between a student's logits and soft targets, and the logits of many models at once.

Letters of shapes: K models, B samples, C classes, d parameters and b buffers of a model. All losses are means over the
samples, in nats where they are entropies, and differentiable in whatever they are given: detach what is a target.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, for the temperature.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mpifed.algorithms.base import Model

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
    batch_statistics: bool = False,
    batched: bool | None = None,
) -> Tensor:
    """The logits `[K, B, C]` of K models of `model`'s architecture, of which nothing is loaded or changed.

    `parameters` `[K, d]` and `buffers` `[K, b]` (running statistics), resident on the device of `x` `[B, ...]`. In
    evaluation mode, each with its own running statistics; with `batch_statistics`, for models whose running statistics
    are not known, batch normalisation uses those of this batch. Differentiable in `x` and in `parameters`.

    `batched` runs the K forward passes as one (`vmap`); by default on an accelerator, where launching K times is what
    costs. On a CPU it would make grouped convolutions of convolutions, which are up to three times slower than a loop.
    An architecture that cannot be batched is looped over.
    """
    counters: dict[str, Tensor] = {}
    if batch_statistics:  # batch normalisation then moves its running statistics and counts, those of these copies
        buffers = buffers.clone()
        counters = {name: b.clone() for name, b in model.module.named_buffers() if not b.is_floating_point()}

    def one(parameters: Tensor, buffers: Tensor) -> Tensor:
        named = model.layout.views(parameters) | model.buffer_layout.views(buffers) | counters
        return functional_call(model.module, named, (x,))

    with _evaluation(model.module, batch_statistics):
        if x.is_cuda if batched is None else batched:
            try:
                return vmap(one)(parameters, buffers)
            except RuntimeError:  # an operation that vmap does not know; what is wrong otherwise, the loop raises again
                pass
        return torch.stack([one(*member) for member in zip(parameters, buffers, strict=True)])


@contextmanager
def _evaluation(module: nn.Module, batch_statistics: bool) -> Iterator[None]:
    """Evaluation mode, but for batch normalisation where it is to use the batch; every part's mode is restored."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    for part, _ in modes:
        if batch_statistics and isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.training = True
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
