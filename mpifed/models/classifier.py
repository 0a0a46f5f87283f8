"""What all classifiers here have in common: a feature extractor, a last linear layer `head`, and a trace.

A trace is what a distillation of hidden states and attention maps compares (FedKD, arXiv:2108.13323, for one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from mpifed.errors import BadInput

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
