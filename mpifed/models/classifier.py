"""What all classifiers here have in common: a feature extractor `body` and a last linear layer `head`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from mpifed.errors import BadInput

Width = Annotated[int, Field(ge=1, description="units or channels of a layer")]


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
            f"shape {input_shape}; choose 'mlp' or 'linear'."
        )
    return input_shape[0]
