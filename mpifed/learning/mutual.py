"""Mutual distillation: two models train on the same batches and learn from each other, as FedKD's mentor and mentee do.

Wu, Wu, Lyu, Huang, Xie: Communication-efficient federated learning via knowledge distillation, Nature Communications
13, 2032 (2022), https://doi.org/10.1038/s41467-022-29763-x, equations 1 to 8. With y the labels, y_t and y_s the
probabilities, H_t and H_s hidden states, A_t and A_s attention maps of mentor (t) and mentee (s):

    task      T_t = CE(y, y_t)                          T_s = CE(y, y_s)
    outputs   K_t = KL(y_s || y_t) / D                  K_s = KL(y_t || y_s) / D          D = T_t + T_s
    hidden    R = (sum over layers of MSE(H_t, W H_s) + MSE(A_t, A_s)) / D
    mentor    L_t = T_t + K_t + R
    mentee    L_s = T_s + K_s + R

D is one number a batch. Where predictions are bad, distillation counts little.

Shapes: b samples, c classes, t tokens, w width, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpifed.algorithms.base import ClientContext, Env, Model
from mpifed.errors import BadInput
from mpifed.learning.distillation import kl_divergence
from mpifed.learning.local import batches, learning_rate, make_optimizer, model_optimizer, seed_dropout
from mpifed.models.classifier import Trace, trace
from mpifed.types import State


# --- the losses -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mutual:
    """Which terms there are, and what is differentiated."""

    distillation: float = 1.0
    """Weight of K; 0 leaves it out, as below."""
    hidden: float = 1.0
    """Weight of the hidden states in R."""
    attention: float = 1.0
    """Weight of the attention maps in R; counts where both models have such."""
    adaptive: bool = True
    """Divide by D; else by 1."""
    epsilon: float = 1e-6
    """Added to D, which goes to zero where both models have learnt their samples by heart."""
    projection: bool = True
    """W stands before the mentee's hidden states; without, both models need the same width."""
    kl: Literal["batchmean", "mean"] = "batchmean"
    """`batchmean`: the divergence of a sample, averaged; `mean`: that divided by the number of classes."""
    gradients: Literal["own", "sum"] = "own"
    """`own`: each model follows the gradient of its own loss. `sum`: both follow that of L_t + L_s, where R is there
    twice, and where the other model's loss pulls too, unless it is detached."""
    detach_targets: bool = True
    """In K, the other model's probabilities are constants. No difference with gradients of one's own."""
    detach_denominator: bool = True
    """D is a constant."""


@dataclass(frozen=True)
class Losses:
    """L_t and L_s, scalars with a graph, and their terms before the division by D."""

    mentor: Tensor
    mentee: Tensor
    mentor_task: Tensor
    mentee_task: Tensor
    divergence: Tensor  # K_t D
    distance: Tensor  # R D


def mutual_losses(
    mutual: Mutual, mentor: Trace, mentee: Trace, labels: Tensor, projections: Sequence[Tensor] = ()
) -> Losses:
    """The losses of one batch; `projections`: W of every pair of layers, `[mentor width, mentee width]`."""
    task = F.cross_entropy(mentor.logits, labels), F.cross_entropy(mentee.logits, labels)
    nothing = torch.zeros((), device=labels.device)
    divergence = nothing, nothing
    if mutual.distillation:
        divergence = _divergence(mutual, mentor, mentee), _divergence(mutual, mentee, mentor)
    distance = nothing
    if mutual.hidden:
        distance = distance + mutual.hidden * hidden_distance(mentor, mentee, projections)
    if mutual.attention and mentor.attention and mentee.attention:
        distance = distance + mutual.attention * attention_distance(mentor, mentee)
    by: Tensor | float = 1.0
    if mutual.adaptive:
        by = task[0] + task[1] + mutual.epsilon
        by = by.detach() if mutual.detach_denominator else by
    mentor_loss, mentee_loss = (
        own + (mutual.distillation * other + distance) / by for own, other in zip(task, divergence, strict=True)
    )
    return Losses(mentor_loss, mentee_loss, *task, divergence[0], distance)


def _divergence(mutual: Mutual, student: Trace, teacher: Trace) -> Tensor:
    target = teacher.logits.detach() if mutual.detach_targets else teacher.logits
    divergence = kl_divergence(student.logits, target)
    return divergence / target.shape[1] if mutual.kl == "mean" else divergence


def layer_pairs(mentor_layers: int, mentee_layers: int) -> list[tuple[int, int]]:
    """(mentor layer, mentee layer), from 0: mentee layer j of n is paired with mentor layer ceil(j N / n) of N.

    4 layers of 12: 3, 6, 9 and 12, as in the paper. The last ones are always a pair.
    """
    return [(-(-j * mentor_layers // mentee_layers) - 1, j - 1) for j in range(1, mentee_layers + 1)]


def hidden_distance(mentor: Trace, mentee: Trace, projections: Sequence[Tensor]) -> Tensor:
    """Sum over the pairs of layers of MSE(H_t, W H_s), the mean over tokens (not padding) and units."""
    distance = torch.zeros((), device=mentor.logits.device)
    for number, (i, j) in enumerate(layer_pairs(len(mentor.hidden), len(mentee.hidden))):
        state = F.linear(mentee.hidden[j], projections[number]) if projections else mentee.hidden[j]
        square = (mentor.hidden[i].float() - state.float()).square().mean(dim=-1)  # [b] or [b, t]
        distance = distance + _mean(square, mentor.mask)
    return distance


def attention_distance(mentor: Trace, mentee: Trace) -> Tensor:
    """Sum over the pairs of layers of MSE(A_t, A_s), the mean over heads and pairs of tokens (not padding).

    Head by head; where the models have other numbers of heads, the mean over the heads of each.
    """
    distance = torch.zeros((), device=mentor.logits.device)
    both = None if mentor.mask is None else mentor.mask.unsqueeze(2) & mentor.mask.unsqueeze(1)  # [b, t, t]
    for i, j in layer_pairs(len(mentor.attention), len(mentee.attention)):
        one, other = mentor.attention[i].float(), mentee.attention[j].float()
        if one.shape[1] != other.shape[1]:
            one, other = one.mean(dim=1, keepdim=True), other.mean(dim=1, keepdim=True)
        distance = distance + _mean((one - other).square().mean(dim=1), both)
    return distance


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the values where the mask is true."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)


# --- the models -------------------------------------------------------------------------------------------------------
def projection_shapes(mutual: Mutual, mentor: Model, mentee: Model, env: Env) -> list[tuple[int, int]]:
    """`[mentor width, mentee width]` of every W. Raises `BadInput` where the hidden states cannot be compared."""
    if not mutual.hidden:
        return []
    one, other = (_trace_of_nothing(model, env).hidden for model in (mentor, mentee))
    shapes = []
    for i, j in layer_pairs(len(one), len(other)):
        if one[i].dim() != other[j].dim():
            raise BadInput(
                f"algorithm.hidden: the mentor's hidden states are of shape {tuple(one[i].shape[1:])} and the mentee's "
                f"of {tuple(other[j].shape[1:])}; choose models of one kind, or hidden = 0"
            )
        shapes.append((one[i].shape[-1], other[j].shape[-1]))
    if mutual.projection:
        return shapes
    for width, own in shapes:
        if width != own:
            raise BadInput(
                f"algorithm.projection: hidden states of width {width} (mentor) and {own} (mentee) cannot be compared "
                "without the matrix W; set projection = true, or hidden = 0, or choose models of one width"
            )
    return []


def _trace_of_nothing(model: Model, env: Env) -> Trace:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return trace(model.module, torch.zeros(1, *env.spec.input_shape, dtype=env.spec.dtype, device=env.device))
    finally:
        model.train(training)


# --- training ---------------------------------------------------------------------------------------------------------
def mutual_training(
    ctx: ClientContext,
    mutual: Mutual,
    projections: Sequence[Tensor],
    mentor_lr: float | None = None,
    optimizers: Mapping[str, State] | None = None,
) -> tuple[list[Tensor], dict[str, State]]:
    """Train the client's own model (mentor) and the shared one (mentee), both loaded, on the client's samples.

    `mentor_lr` is the mentor's learning rate in round 1, in place of `local.lr`; `optimizers` are states to go on from.
    Returns the next W of every pair of layers, and the states of the optimisers. Logs `train_loss` (the mentor's task
    loss), `mentee_train_loss`, and K and R before the division by D as `divergence` and `distance`. Raises
    FloatingPointError where one of them is not finite.
    """
    local, mentor, mentee = ctx.local, ctx.model, ctx.env.model()
    projections = [projection.clone().requires_grad_() for projection in projections]
    rate = learning_rate(local, ctx.round, ctx.env.rounds)
    steppers = {
        "mentor": model_optimizer(mentor, local, rate if mentor_lr is None else rate * mentor_lr / local.lr),
        "mentee": model_optimizer(mentee, local, rate),
    }
    if projections:
        steppers["projection"] = make_optimizer([projection.detach() for projection in projections], local, rate)
    for name, state in (optimizers or {}).items():
        steppers[name].restore(state)

    mentor.train()
    mentee.train()
    seed_dropout(ctx.generator("dropout"), ctx.y.device)
    lower = local.precision == "bfloat16"
    precision = torch.autocast(ctx.x.device.type, torch.bfloat16) if lower else nullcontext()
    steps, totals = 0, torch.zeros(4, dtype=torch.float64, device=ctx.y.device)
    for x, y in batches(ctx):
        mentor.drop_gradient()
        mentee.drop_gradient()
        with precision:
            losses = mutual_losses(mutual, _trace(mutual, mentor, x), _trace(mutual, mentee, x), y, projections)
        gradients = _backward(mutual, losses, mentor, mentee, projections)
        for model in (mentor, mentee):
            if local.clip_norm > 0:
                model.gather_gradient()
                torch.nn.utils.clip_grad_norm_([model.parameters], local.clip_norm)
        steppers["mentor"].step(mentor.gradients())
        steppers["mentee"].step(mentee.gradients())
        if projections:
            steppers["projection"].step(gradients)
        terms = losses.mentor_task, losses.mentee_task, losses.divergence, losses.distance
        totals += torch.stack([term.detach().double() for term in terms])
        steps += 1
    means = (totals / max(1, steps)).tolist()
    if not all(map(math.isfinite, means)):
        raise FloatingPointError("the training loss is not finite")
    for name, mean in zip(("train_loss", "mentee_train_loss", "divergence", "distance"), means, strict=True):
        ctx.log(name, mean)
    return [w.detach() for w in projections], {name: stepper.state() for name, stepper in steppers.items()}


def _backward(
    mutual: Mutual, losses: Losses, mentor: Model, mentee: Model, projections: Sequence[Tensor]
) -> list[Tensor]:
    """Leave each model's gradients in it; returns those of the projections, which are part of the mentee's loss."""
    for projection in projections:
        projection.grad = None
    if mutual.gradients == "own":
        losses.mentor.backward(inputs=_trained(mentor), retain_graph=True)
        losses.mentee.backward(inputs=[*_trained(mentee), *projections])
    else:
        (losses.mentor + losses.mentee).backward()
    return [projection.grad for projection in projections if projection.grad is not None]


def _trained(model: Model) -> list[Tensor]:
    return [parameter for parameter in model.module.parameters() if parameter.requires_grad]


def _trace(mutual: Mutual, model: Model, x: Tensor) -> Trace:
    """The trace, or the logits alone where nothing else is compared: then any model will do."""
    if mutual.hidden or (mutual.attention and hasattr(model.module, "trace")):
        return trace(model.module, x)
    return Trace(model(x), ())
