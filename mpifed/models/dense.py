"""Models of linear layers alone, for inputs of any shape.

`two_nn` is the "2NN" of McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep
Networks from Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

from torch import nn

from mpifed.models.classifier import Classifier, Width
from mpifed.types import DataSpec

Activation = Literal["relu", "tanh", "gelu"]
_ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def linear(spec: DataSpec) -> nn.Module:
    """Softmax regression: one linear layer on the flattened input (convex, so a sound first check of an algorithm)."""
    return mlp(spec, hidden=())


def mlp(spec: DataSpec, *, hidden: Sequence[Width] = (64,), activation: Activation = "relu") -> nn.Module:
    """Linear layers of `hidden` units, each followed by `activation`, and a linear head."""
    body = nn.Sequential()
    body.add_module("flatten", nn.Flatten())
    width = prod(spec.input_shape)
    for number, units in enumerate(hidden, start=1):
        body.add_module(f"linear{number}", nn.Linear(width, units))
        body.add_module(f"{activation}{number}", _ACTIVATIONS[activation]())
        width = units
    return Classifier(body, width, spec.classes)


def two_nn(spec: DataSpec, *, hidden: Width = 200) -> nn.Module:
    """Two hidden layers of 200 units with ReLU: 199,210 parameters on MNIST."""
    return mlp(spec, hidden=(hidden, hidden))
