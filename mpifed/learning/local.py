"""A client's local training: mini-batch SGD or Adam on its own samples, with room for an algorithm's correction.

The whole model is one vector, so a correction (FedProx's proximal term, SCAFFOLD's control variates, FedDyn's linear
and quadratic terms) is one vector operation on the gradient. It comes before clipping, weight decay and momentum, as a
term of the loss would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from mpifed.algorithms.base import ClientContext, Model
from mpifed.types import State

Correction = Callable[[Tensor, Tensor], None]
"""`correction(parameters, gradient)`: adds to the gradient `[d]`, in place."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(logits [batch, classes], labels [batch]) -> scalar`."""

Objective = Callable[[Model, Tensor, Tensor], Tensor]
"""`objective(model, inputs [batch, ...], labels [batch]) -> scalar`: for losses of more than the logits."""


@dataclass(frozen=True)
class Trained:
    """What a local training did.

    `displacement` is how far a constant unit gradient would have moved every parameter: `steps * lr` for plain SGD, and
    `lr * [K - m (1 - m^K) / (1 - m)] / (1 - m)` with momentum m over K steps (FedNova, arXiv 2007.07481). It
    is NaN for Adam.
    """

    steps: int
    loss: float
    displacement: float


def learning_rate(local: Any, round_: int, rounds: int) -> float:
    """The step size of a round (from 1), the same for every client that takes part, whenever it did so last."""
    if local.lr_schedule == "exponential":
        return float(local.lr * local.lr_decay ** (round_ - 1))
    if local.lr_schedule == "step":
        return float(local.lr * local.lr_decay ** ((round_ - 1) // local.lr_step))
    if local.lr_schedule == "cosine":
        return float(local.lr * 0.5 * (1.0 + math.cos(math.pi * (round_ - 1) / rounds)))
    return float(local.lr)


def batches(ctx: ClientContext, purpose: str = "batches") -> Iterator[tuple[Tensor, Tensor]]:
    """The round's mini-batches: `local.epochs` passes, or `local.steps` batches from as many passes as that takes.

    Each pass is a new permutation. The last batch of a pass may be shorter, but is left out where it would hold a
    single sample after others: batch normalisation cannot train on one.
    """
    generator = ctx.generator(purpose)
    size, left = ctx.local.batch_size, ctx.local.steps
    passes = 0
    while passes < ctx.local.epochs if left is None else left > 0:
        for part in one_pass(ctx.examples, size, generator):
            if left is not None:
                if left == 0:
                    return
                left -= 1
            part = part.to(ctx.y.device)
            yield ctx.x[part], ctx.y[part]
        passes += 1


def one_pass(examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The indices below `examples` in a new order, int64 `[batch]` on the CPU; no last batch of one after others."""
    for part in torch.randperm(examples, generator=generator).split(batch_size):
        if len(part) > 1 or examples == 1 or batch_size == 1:
            yield part


def local_training(
    ctx: ClientContext,
    correction: Correction | None = None,
    loss: Loss = F.cross_entropy,
    objective: Objective | None = None,
    optimizer: Optimizer | None = None,
) -> Trained:
    """Train `ctx.model` (loaded by the caller) on the client's samples, as `ctx.local` says; logs `train_loss`.

    Minimises `objective`, or, without one, `loss` of the model's logits. Optimiser state (momentum, Adam's moments) is
    new every round, unless an `optimizer` of the model is given. Raises FloatingPointError where the loss is not
    finite.
    """
    model, local = ctx.model, ctx.local
    rate = learning_rate(local, ctx.round, ctx.env.rounds)
    parameters = model.parameters.detach()
    if optimizer is None:
        optimizer = model_optimizer(model, local, rate)
    model.train()
    _seed(ctx, "dropout")
    lower = local.precision == "bfloat16"
    precision = torch.autocast(ctx.x.device.type, torch.bfloat16) if lower else nullcontext()
    steps, total = 0, torch.zeros((), dtype=torch.float64, device=ctx.y.device)
    for x, y in batches(ctx):
        model.drop_gradient()
        with precision:
            value = loss(model(x), y) if objective is None else objective(model, x, y)
        value.backward()
        if correction is not None or local.clip_norm > 0:
            model.gather_gradient()
        if correction is not None:
            correction(parameters, model.gradient)
        if local.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_([model.parameters], local.clip_norm)
        optimizer.step(model.gradients())
        total += value.detach()
        steps += 1
    mean = float(total) / max(1, steps)
    if not math.isfinite(mean):
        raise FloatingPointError("the training loss is not finite")
    ctx.log("train_loss", mean)
    return Trained(steps, mean, displacement(local, rate, steps))


def displacement(local: Any, rate: float, steps: int) -> float:
    """How far a constant unit gradient moves a parameter in `steps` steps (see `Trained`)."""
    if local.optimizer != "sgd":
        return math.nan
    moved, velocity = 0.0, 0.0
    for _ in range(steps):
        velocity = local.momentum * velocity + 1.0
        moved += rate * (1.0 + local.momentum * velocity if local.nesterov else velocity)
    return moved


def full_gradient(ctx: ClientContext, loss: Loss = F.cross_entropy) -> Tensor:
    """The gradient `[d]` of the mean loss over all samples of the client, at `ctx.model`'s parameters; one pass.

    In training mode, in batches of `local.batch_size`; a last batch of one sample joins the one before it.
    """
    model, size = ctx.model, ctx.local.batch_size
    model.train()
    _seed(ctx, "full gradient")
    gradient = torch.zeros_like(model.gradient)
    starts = list(range(0, ctx.examples, size))
    if len(starts) > 1 and ctx.examples - starts[-1] == 1:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], ctx.examples], strict=True):
        x, y = ctx.x[start:end], ctx.y[start:end]
        model.zero_gradient()
        loss(model(x), y).backward()
        gradient.add_(model.gradient, alpha=len(y) / ctx.examples)
    return gradient


def _seed(ctx: ClientContext, purpose: str) -> None:
    seed_dropout(ctx.generator(purpose), ctx.y.device)


def seed_dropout(generator: torch.Generator, device: torch.device) -> None:
    """Seed what dropout draws from, the device's own generator; `torch.manual_seed` takes 2 ms a call."""
    seed = generator.initial_seed()
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class Optimizer(Protocol):
    """What steps the tensors that it was made for."""

    def step(self, gradients: list[Tensor]) -> None:
        """One step, in place; `gradients` in the order and the shapes of the parameters."""

    def state(self) -> State:
        """What it remembers of its steps, flat tensors by name; empty where it remembers nothing."""

    def restore(self, state: State) -> None:
        """Go on from what `state()` gave, an empty one being that of no step."""


@dataclass(frozen=True)
class Plain:
    """Settings of an optimiser that is not the clients', for where no `[local]` applies."""

    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False


def parts_of(model: Model) -> list[Tensor]:
    """A model's parameters one by one, detached: what an optimiser of the model steps."""
    return list(model.layout.views(model.parameters.detach()).values())


def model_optimizer(model: Model, settings: Any, rate: float) -> Optimizer:
    """`make_optimizer` over all parameters of a model, with the decay of its head where `settings` ask for it."""
    return _with_head_decay(model, settings, make_optimizer(parts_of(model), settings, rate))


def adam_optimizer(model: Model, settings: Any, rate: float) -> Optimizer:
    """The same with Adam, whatever the `settings` name."""
    return _with_head_decay(model, settings, Adam(parts_of(model), settings, rate))


def _with_head_decay(model: Model, settings: Any, optimizer: Optimizer) -> Optimizer:
    if not settings.head_decay:
        return optimizer
    index = model.layout.names.index(HEAD)
    return HeadDecay(optimizer, index, parts_of(model)[index], settings.head_decay)


def make_optimizer(parameters: list[Tensor], settings: Any, rate: float) -> Optimizer:
    """SGD or Adam over `parameters` (detached, changed in place) as `settings` (of the form of `[local]`) say."""
    return Adam(parameters, settings, rate) if settings.optimizer == "adam" else Sgd(parameters, settings, rate)


class Sgd:
    """`torch.optim.SGD`.

    By its functional form, as Adam below: the first `Optimizer` of a process imports torch's compiler, which costs
    every rank about as much as importing torch itself.
    """

    def __init__(self, parameters: list[Tensor], local: Any, rate: float) -> None:
        self._parameters = parameters
        self._options = {
            "lr": rate,
            "momentum": local.momentum,
            "nesterov": local.nesterov,
            "weight_decay": local.weight_decay,
            "dampening": 0.0,
            "maximize": False,
            "foreach": parameters[0].is_cuda,
        }
        self._velocities: list[Tensor | None] = [None] * len(parameters)

    def step(self, gradients: list[Tensor]) -> None:
        sgd(self._parameters, gradients, self._velocities, **self._options)

    def state(self) -> State:
        """`velocity` `[d]`, where there is momentum and a step was made."""
        velocities = [velocity.reshape(-1) for velocity in self._velocities if velocity is not None]
        return {"velocity": torch.cat(velocities)} if velocities else {}

    def restore(self, state: State) -> None:
        if state:
            parts = state["velocity"].split([part.numel() for part in self._parameters])
            self._velocities = [v.view_as(part).clone() for v, part in zip(parts, self._parameters, strict=True)]


class Adam:
    """`torch.optim.Adam`, by default with its betas and epsilon.

    `state()` and `restore()` carry the moments from one round to the next, where an algorithm keeps them in the
    client's or the server's state. `rate` may be changed between steps.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        settings: Any,
        rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.rate = rate
        self._parameters = parameters
        self._options = {
            "beta1": betas[0],
            "beta2": betas[1],
            "eps": 1e-8,
            "weight_decay": settings.weight_decay,
            "amsgrad": False,
            "maximize": False,
            "foreach": parameters[0].is_cuda,
        }
        self._means = [torch.zeros_like(part) for part in parameters]
        self._squares = [torch.zeros_like(part) for part in parameters]
        self._steps = [torch.zeros(()) for _ in parameters]

    def step(self, gradients: list[Tensor]) -> None:
        adam(self._parameters, gradients, self._means, self._squares, [], self._steps, lr=self.rate, **self._options)

    def state(self) -> State:
        """`mean` and `square`, the moments `[d]`, and `steps`, how many were made."""
        flat = [torch.cat([part.reshape(-1) for part in parts]) for parts in (self._means, self._squares)]
        return {"mean": flat[0], "square": flat[1], "steps": self._steps[0].clone()}

    def restore(self, state: State) -> None:
        if not state:
            return
        sizes = [part.numel() for part in self._parameters]
        for moments, name in ((self._means, "mean"), (self._squares, "square")):
            for moment, part in zip(moments, state[name].split(sizes), strict=True):
                moment.copy_(part.view_as(moment))
        for steps in self._steps:
            steps.copy_(state["steps"])


HEAD = "head.weight"
"""The kernel of a classifier's last layer, `[classes, features]` (`mpifed.models.classifier`)."""


class HeadDecay:
    """An optimiser of a loss that has `factor * |W|^2` added, W the kernel of the last layer: Keras' L2 regulariser.

    As a term of the gradient, 2 * factor * W: the loss that is logged is without it.
    """

    def __init__(self, inner: Optimizer, index: int, kernel: Tensor, factor: float) -> None:
        self._inner, self._index, self._kernel, self._factor = inner, index, kernel, factor

    def step(self, gradients: list[Tensor]) -> None:
        gradients[self._index].add_(self._kernel, alpha=2.0 * self._factor)
        self._inner.step(gradients)

    def state(self) -> State:
        return self._inner.state()

    def restore(self, state: State) -> None:
        self._inner.restore(state)
