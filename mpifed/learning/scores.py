"""Class scores, a model's logits: computing them, and training a model towards given ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mpifed.algorithms.base import ClientContext, Model
from mpifed.learning.distillation import answers_of
from mpifed.learning.local import Optimizer, one_pass, seed_dropout

ScoreLoss = Callable[[Tensor, Tensor], Tensor]
"""`loss(scores [batch, classes], targets [batch, classes]) -> scalar`."""


def scores(model: Model, x: Callable[[Tensor], Tensor], indices: Tensor, batch_size: int = 256) -> Tensor:
    """Logits `[k, classes]` of the samples `x(indices)`, `indices` int64 `[k]`, in evaluation mode."""
    model.eval()
    return answers_of(model, x, indices, batch_size)


def digest(
    ctx: ClientContext,
    indices: Tensor,
    targets: Tensor,
    loss: ScoreLoss,
    epochs: int,
    batch_size: int,
    optimizer: Optimizer,
) -> None:
    """Train `ctx.model` (loaded) on the public samples `indices` `[n]` towards `targets` `[n, classes]`.

    In training mode; inputs and targets go through every epoch in one new order. Logs `digest_loss`, the mean over all
    batches. Raises FloatingPointError where it is not finite.
    """
    model, public = ctx.model, ctx.env.public
    assert public is not None
    shuffle = ctx.generator("digest")
    seed_dropout(ctx.generator("digest dropout"), targets.device)
    model.train()
    total, steps = torch.zeros((), dtype=torch.float64, device=targets.device), 0
    for _ in range(epochs):
        for part in one_pass(len(indices), batch_size, shuffle):
            model.drop_gradient()
            value = loss(model(public.x(indices[part])), targets[part])
            value.backward()
            optimizer.step(model.gradients())
            total, steps = total + value.detach(), steps + 1
    if steps:
        if not math.isfinite(float(total)):
            raise FloatingPointError("the loss of the digest is not finite")
        ctx.log("digest_loss", float(total) / steps)
