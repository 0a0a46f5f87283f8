"""Accuracy and mean cross-entropy of a classifier on labelled samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mpifed.algorithms.base import Model


class Evaluated(Model, Protocol):
    """A model that knows its mode, as `mpifed.models.flat.FlatModel` does."""

    @property
    def training(self) -> bool: ...

    def train(self, mode: bool = True) -> None: ...


class Samples(Protocol):
    """A tensor, or what gives its batches."""

    def __len__(self) -> int: ...

    def split(self, size: int, /) -> Iterable[Tensor]: ...


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` = `correct` / `examples`; `loss` is the mean cross-entropy in nats, NaN or infinite if a logit is."""

    accuracy: float
    loss: float
    examples: int
    correct: int


def evaluate(
    model: Evaluated,
    x: Samples,
    y: Tensor,
    batch_size: int,
    *,
    standardise: Callable[[Tensor], Tensor] | None = None,
    between: Callable[[], None] | None = None,
    members: Sequence[tuple[Tensor, Tensor]] = (),
    weights: Sequence[float] = (),
) -> Evaluation:
    """Test `model` in evaluation mode, without gradients; its mode is restored, also when something raises.

    With `members`, parameters `[d]` and buffers `[b]` that are loaded into `model`: one, or several that predict
    together, by the mean of their logits (an ensemble), weighted where there are `weights`. Without, the model is
    tested as it is.

    `x` `[examples, *input_shape]` is model input, or, with `standardise`, stored samples (uint8, say) that it makes
    into model input batch by batch. `y` is int64 `[examples]`. Both may lie on another device than the model.
    `between` is called after every batch: a place to poll, or to raise so as to stop.

    Raises `ValueError` for no examples, unequal lengths, or a batch size below 1.
    """
    examples = len(y)
    if examples == 0 or len(x) != examples or batch_size < 1:
        raise ValueError(f"cannot evaluate {len(x)} samples with {examples} labels in batches of {batch_size}")
    device = model.parameters.device
    # Accumulated on the device: asking for a number after every batch would make an accelerator wait.
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    training = model.training
    model.eval()
    if len(members) == 1:
        model.load(*members[0])
    try:
        with torch.no_grad():
            for samples, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
                samples, labels = samples.to(device), labels.to(device)
                inputs = samples if standardise is None else standardise(samples)
                logits = model(inputs) if len(members) < 2 else _mean_logits(model, members, weights, inputs)
                loss += functional.cross_entropy(logits, labels, reduction="none").sum(dtype=torch.float64)
                correct += (logits.argmax(dim=1) == labels).sum()
                if between is not None:
                    between()
    finally:
        model.train(training)
    return Evaluation(correct.item() / examples, loss.item() / examples, examples, int(correct.item()))


def _mean_logits(
    model: Evaluated, members: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], inputs: Tensor
) -> Tensor:
    """`[batch, classes]`."""
    weights = weights or [1.0] * len(members)
    total = torch.zeros((), device=inputs.device)
    for member, weight in zip(members, weights, strict=True):
        model.load(*member)
        total = total + weight * model(inputs)
    return total / sum(weights)
