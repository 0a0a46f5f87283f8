"""ResNet-18 of He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, from torchvision.

Group normalisation instead of batch normalisation keeps the model free of running statistics, which clients with
unlike data cannot share well; two groups are usual in federated learning (Reddi et al., "Adaptive Federated
Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295; Acar et al., ICLR 2021).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torchvision
from torch import nn

from mpifed.models.classifier import Classifier, channels_of
from mpifed.types import DataSpec


def _group_norm(channels: int, *, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels)


def resnet18(
    spec: DataSpec,
    *,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    norm: Literal["batch", "group"] = "batch",
    groups: Literal[1, 2, 4, 8, 16, 32, 64] = 2,
) -> nn.Module:
    """ResNet-18 without pretraining; the features are the 512 averages before the last layer.

    `stem="imagenet"` is torchvision's (7x7 convolution of stride 2 and max-pooling): 11,181,642 parameters at 10
    classes. `stem="cifar"` (3x3 convolution of stride 1, no pooling) keeps the resolution of small images, at about
    sixteen times the work. `groups` counts with `norm="group"` alone.
    """
    channels = channels_of(spec.input_shape, "resnet18")
    norm_layer = nn.BatchNorm2d if norm == "batch" else partial(_group_norm, groups=groups)
    body = torchvision.models.resnet18(num_classes=1, norm_layer=norm_layer)
    if stem == "cifar":
        body.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        body.maxpool = nn.Identity()
    elif channels != 3:
        body.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
    features = body.fc.in_features
    body.fc = nn.Identity()
    return Classifier(body, features, spec.classes)
