"""What all classifiers here have in common: a feature extractor, a last linear layer `head`, and a trace.

A trace is what a distillation of hidden states and attention maps compares (FedKD, arXiv:2108.13323, for one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mpifed.errors import BadInput
from mpifed.types import Layout

Width = Annotated[int, Field(ge=1, description="units or channels of a layer")]


@dataclass(frozen=True)
class Trace:
    """What a forward pass came by, all of it differentiable, one entry of `hidden` and of `attention` a layer.

    - `logits` `[batch, classes]`: the same as the forward pass gives.
    - `hidden`: what each layer of a text model gives the next, `[batch, tokens, width]`; of any other model its
      features alone, `[batch, features]`.
    - `attention`: every layer's attention maps `[batch, heads, tokens, tokens]`, before dropout: row i is how token i
      weighs the tokens, and sums to 1. Empty where a model has none.
    - `mask`: bool `[batch, tokens]`, False at padding, where hidden states and rows mean nothing; None where there are
      no tokens. `tokens` is that of the longest text of the batch.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...]
    attention: tuple[Tensor, ...] = ()
    mask: Tensor | None = None


class Classifier(nn.Module):
    """`head(body(x))`: the head's parameters are `head.weight` `[classes, features]` and, with `bias`, `head.bias`."""

    def __init__(self, body: nn.Module, features: int, classes: int, bias: bool = True) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, classes, bias=bias)

    def features(self, x: Tensor) -> Tensor:
        """Inputs `[batch, *input_shape]` -> what the head is given, `[batch, features]`."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `[batch, *input_shape]` -> logits `[batch, classes]`."""
        return self.head(self.features(x))


def trace(module: nn.Module, x: Tensor) -> Trace:
    """`module`'s trace of inputs `[batch, *input_shape]`, in one forward pass.

    A module with a method `trace(x) -> Trace` has its own; the one hidden state of others is what `split` calls their
    features.
    """
    own: Callable[[Tensor], Trace] | None = getattr(module, "trace", None)
    if own is not None:
        return own(x)
    features, head = split(module)
    hidden = features(x)
    return Trace(head(hidden), (hidden,))


def split(module: nn.Module) -> tuple[Callable[[Tensor], Tensor], nn.Linear]:
    """A classifier's feature extractor and head, which may have no bias: `head(features(x))` are its logits.

    Any module with a method `features` and a `torch.nn.Linear` called `head` will do; raises `BadInput` for others.
    """
    features, head = getattr(module, "features", None), getattr(module, "head", None)
    if not callable(features) or not isinstance(head, nn.Linear):
        raise BadInput(
            f"model.name: {type(module).__name__} cannot be split into a feature extractor and a head, which this "
            "algorithm needs; give it a method `features(x)` and a torch.nn.Linear called `head`."
        )
    return features, head


def channels_of(input_shape: tuple[int, ...], name: str) -> int:
    """The channels of an image's shape `(channels, height, width)`; raises `BadInput` for any other."""
    if len(input_shape) != 3:
        raise BadInput(
            f"model.name: '{name}' needs images of shape (channels, height, width), and this data set has inputs of "
            f"shape {input_shape}; choose 'mlp' or 'linear' ('transformer' for text)."
        )
    return input_shape[0]


@dataclass(frozen=True)
class Parts:
    """Which part of a classifier's flat vector `[d]` is its head `[h]`; the rest is its body `[d - h]`."""

    layout: Layout
    start: int
    end: int

    @classmethod
    def of(cls, module: nn.Module, layout: Layout) -> Parts:
        """Those of a module with the parameters of `layout`; raises `BadInput` as `split` does."""
        _, head = split(module)
        ids = {id(parameter) for parameter in head.parameters()}
        names = [name for name, parameter in module.named_parameters() if id(parameter) in ids]
        places = [layout.names.index(name) for name in names]
        if places != list(range(places[0], places[-1] + 1)):
            raise BadInput(f"model.name: the head of {type(module).__name__} is not in one piece; {names}")
        last = places[-1]
        return cls(layout, layout.offsets[places[0]], layout.offsets[last] + layout.sizes[last])

    def head(self, flat: Tensor) -> Tensor:
        """`[..., d]` -> `[..., h]`, sharing memory with it."""
        return flat[..., self.start : self.end]

    def body(self, flat: Tensor) -> Tensor:
        """`[..., d]` -> `[..., d - h]`, a copy."""
        return torch.cat([flat[..., : self.start], flat[..., self.end :]], dim=-1)

    def join(self, body: Tensor, head: Tensor) -> Tensor:
        """The vector `[d]` of these parts."""
        return torch.cat([body[: self.start], head, body[self.start :]])

    @property
    def head_layout(self) -> Layout:
        return self._select(lambda offset: self.start <= offset < self.end)

    @property
    def body_layout(self) -> Layout:
        return self._select(lambda offset: not self.start <= offset < self.end)

    def _select(self, wanted: Callable[[int], bool]) -> Layout:
        layout = self.layout
        kept = [i for i, offset in enumerate(layout.offsets) if wanted(offset)]
        return Layout(tuple(layout.names[i] for i in kept), tuple(layout.shapes[i] for i in kept))

    def linear(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Heads `[K, h]` -> weights `[K, classes, features]` and biases `[K, classes]` (zeros where there is none)."""
        shapes = self.head_layout.shapes
        classes, features = shapes[0]
        weights = heads[:, : classes * features].reshape(-1, classes, features)
        biases = heads[:, classes * features :] if len(shapes) > 1 else heads.new_zeros(len(heads), classes)
        return weights, biases
