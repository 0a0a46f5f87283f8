"""The model zoo of Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", 2019.

https://arxiv.org/abs/1910.03581, Tables 1 and 2. The tables give channels and dropout alone; kernels, strides, pooling
and the head without bias are those of the authors' code (github.com/diogenes0319/FedMD_clean), which has nets of two
and of three layers and trains the ten of Table 1 on CIFAR too. The net of four layers (Table 2, last row) is nowhere
described: here it is the one of three with a further 3x3 convolution that keeps the 3x3 map.

The authors' L2 penalty on the head, 1e-3 |W|^2, is part of their training, not of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mpifed.models import keras, probe
from mpifed.models.classifier import Classifier, Width, channels_of
from mpifed.types import DataSpec

Zoo = tuple[tuple[tuple[int, ...], float], ...]

TABLE_1: Zoo = (
    ((128, 256), 0.2),
    ((128, 384), 0.2),
    ((128, 512), 0.2),
    ((256, 256), 0.3),
    ((256, 512), 0.4),
    ((64, 128, 256), 0.2),
    ((64, 128, 192), 0.2),
    ((128, 192, 256), 0.2),
    ((128, 128, 128), 0.3),
    ((128, 128, 192), 0.3),
)
"""`channels` and `dropout` of the ten participants on MNIST and FEMNIST; in the authors' code also on CIFAR."""

TABLE_2: Zoo = (
    ((128, 256), 0.2),
    ((128, 128, 192), 0.2),
    ((64, 64, 64), 0.2),
    ((128, 64, 64), 0.3),
    ((64, 64, 128), 0.4),
    ((64, 128, 256), 0.2),
    ((64, 128, 192), 0.2),
    ((128, 192, 256), 0.2),
    ((128, 128, 128), 0.3),
    ((64, 64, 64, 64), 0.2),
)
"""`channels` and `dropout` of the ten participants on CIFAR, as the paper has them."""


def fedmd_cnn(
    spec: DataSpec,
    *,
    channels: Annotated[Sequence[Width], Field(min_length=2, max_length=4)] = (128, 256),
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> nn.Module:
    """Two to four convolutions, each with batch normalisation, ReLU and dropout, and a head without bias.

    - two: 3x3 "same", 2x2 average pooling of stride 1, 3x3 of stride 2;
    - three: 3x3 "same", 2x2 average pooling of stride 1, 2x2 of stride 2, 2x2 average pooling, 3x3 of stride 2;
    - four: as three, then 3x3 "same".

    Initial weights, and momentum and epsilon of the batch normalisation, are Keras'. Participant 0 of Table 1 has
    989,440 parameters at 28x28x1 and 16 classes. Three or four convolutions need images of 12x12 pixels.
    """
    first, second, *others = channels
    width = channels_of(spec.input_shape, "fedmd_cnn")
    body = nn.Sequential()

    def block(number: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        nonlocal width
        body.add_module(f"conv{number}", nn.Conv2d(width, outputs, kernel, stride, padding))
        body.add_module(f"norm{number}", nn.BatchNorm2d(outputs, eps=keras.EPSILON, momentum=keras.MOMENTUM))
        body.add_module(f"relu{number}", nn.ReLU())
        body.add_module(f"dropout{number}", nn.Dropout(dropout))
        width = outputs

    block(1, first, 3, padding=1)
    body.add_module("pool1", SameAveragePool())
    if not others:
        block(2, second, 3, stride=2)
    else:
        block(2, second, 2, stride=2)
        body.add_module("pool2", nn.AvgPool2d(2))
        block(3, others[0], 3, stride=2)
        if len(others) == 2:
            block(4, others[1], 3, padding=1)
    body.add_module("flatten", nn.Flatten())
    (features,) = probe(body, spec.input_shape, "fedmd_cnn")
    return keras.initialise(Classifier(body, features, spec.classes, bias=False))


class SameAveragePool(nn.Module):
    """2x2 average pooling of stride 1 that keeps the size, as Keras pads: `[b, c, h, w]` -> `[b, c, h, w]`.

    An output is the mean of the cell, its right, its lower and its lower right neighbour, where there are such: at the
    border it divides by the cells that exist.
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 2, stride=1, padding=1, count_include_pad=False)[:, :, 1:, 1:]
