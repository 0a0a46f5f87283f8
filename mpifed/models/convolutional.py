"""Small convolutional classifiers of federated-learning papers, for images `(channels, height, width)` of any size.

- `cnn`: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
  https://arxiv.org/abs/1602.05629, section 3.
- `feddyn_cnn`: Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021,
  https://openreview.net/forum?id=B7v4QMR6Z9w. The authors' code has 384 units where the paper prints 394.
- `fedgen_net`: Zhu, Hong, Zhou, "Data-Free Knowledge Distillation for Heterogeneous Federated Learning", ICML 2021,
  https://arxiv.org/abs/2105.10056: the network of the authors' code, which is much smaller than the one cited there.
- `fd_cnn`: Jeong et al., "Communication-Efficient On-Device Machine Learning: Federated Distillation and Augmentation
  under Non-IID Private Data", 2018, https://arxiv.org/abs/1811.11479. The paper gives the kinds of its five layers and
  1,199,648 parameters, which this net has and which is Keras' MNIST example without biases; dropout is not mentioned.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import nn

from mpifed.models import probe
from mpifed.models.classifier import Classifier, Width, channels_of
from mpifed.types import DataSpec


def cnn(spec: DataSpec, *, hidden: Width = 512) -> nn.Module:
    """Two 5x5 convolutions (32 and 64 channels, same padding) with 2x2 max-pooling, then a layer of `hidden` units.

    1,663,370 parameters on MNIST.
    """
    body = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels_of(spec.input_shape, "cnn"), 32, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
        )
    )
    (width,) = probe(body, spec.input_shape, "cnn")
    body.add_module("linear", nn.Linear(width, hidden))
    body.add_module("relu3", nn.ReLU())
    return Classifier(body, hidden, spec.classes)


def feddyn_cnn(spec: DataSpec, *, channels: Width = 64, hidden1: Width = 384, hidden2: Width = 192) -> nn.Module:
    """Two 5x5 convolutions of 64 channels without padding, with 2x2 max-pooling, then layers of 384 and 192 units.

    797,962 parameters on CIFAR-10. Images of at least 16x16 pixels.
    """
    body = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels_of(spec.input_shape, "feddyn_cnn"), channels, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(channels, channels, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
        )
    )
    (width,) = probe(body, spec.input_shape, "feddyn_cnn")
    body.add_module("linear1", nn.Linear(width, hidden1))
    body.add_module("relu3", nn.ReLU())
    body.add_module("linear2", nn.Linear(hidden1, hidden2))
    body.add_module("relu4", nn.ReLU())
    return Classifier(body, hidden2, spec.classes)


def fedgen_net(
    spec: DataSpec,
    *,
    channels: Annotated[Sequence[Width], Field(min_length=1)] = (6, 16),
    pool: bool = False,
    latent: Width = 32,
) -> nn.Module:
    """3x3 convolutions of stride 2 with batch normalisation and ReLU, then a linear layer to the latent space.

    The latent representation `[batch, latent]` is what `features` gives: no activation stands between it and the head,
    so it is unbounded, and a generator can imitate it. 26,434 parameters on MNIST, 26,962 on EMNIST's 26 letters.
    `channels = [16, 32, 64]` with `pool = true` (2x2 max-pooling after every convolution) is the authors' CelebA net.
    """
    body = nn.Sequential()
    width = channels_of(spec.input_shape, "fedgen_net")
    for number, outputs in enumerate(channels, start=1):
        body.add_module(f"conv{number}", nn.Conv2d(width, outputs, 3, stride=2, padding=1))
        body.add_module(f"norm{number}", nn.BatchNorm2d(outputs))
        body.add_module(f"relu{number}", nn.ReLU())
        if pool:
            body.add_module(f"pool{number}", nn.MaxPool2d(2))
        width = outputs
    body.add_module("flatten", nn.Flatten())
    (flat,) = probe(body, spec.input_shape, "fedgen_net")
    body.add_module("latent", nn.Linear(flat, latent))
    return Classifier(body, latent, spec.classes)


def fd_cnn(spec: DataSpec, *, hidden: Width = 128) -> nn.Module:
    """Two 3x3 convolutions (32 and 64 channels, no padding), 2x2 max-pooling, `hidden` units, a head; no biases.

    1,199,648 parameters on MNIST, the number of the paper.
    """
    body = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels_of(spec.input_shape, "fd_cnn"), 32, 3, bias=False),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 3, bias=False),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
        )
    )
    (width,) = probe(body, spec.input_shape, "fd_cnn")
    body.add_module("linear", nn.Linear(width, hidden, bias=False))
    body.add_module("relu3", nn.ReLU())
    return Classifier(body, hidden, spec.classes, bias=False)
