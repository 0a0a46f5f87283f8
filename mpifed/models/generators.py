"""Conditional generators of the data-free and augmenting systems, and the discriminator that trains one of them.

No classifiers, so no job names them: an algorithm builds its own. Each maps float32 noise `[batch, noise]` and int64
labels `[batch]` to float32 samples of those labels; nothing here draws the noise. Initial weights come from torch's
default generator (`mpifed.models.initialise` makes them a function of a seed).

- `latent_generator`: Zhu, Hong, Zhou, "Data-Free Knowledge Distillation for Heterogeneous Federated Learning", ICML
  2021, https://arxiv.org/abs/2105.10056; sizes and the embedding as in the authors' code.
- `image_generator`: Zhang, Shen, Ding, Tao, Duan, "Fine-tuning Global Model via Data-Free Knowledge Distillation for
  Non-IID Federated Learning", CVPR 2022, https://arxiv.org/abs/2203.09249; the authors' `CGeneratorA`.
- `faug_generator`, `faug_discriminator`: Jeong et al., "Communication-Efficient On-Device Machine Learning: Federated
  Distillation and Augmentation under Non-IID Private Data", 2018, https://arxiv.org/abs/1811.11479. The paper says
  four layers and 1,493,520 parameters, which is the conditional GAN of github.com/eriklindernoren/Keras-GAN without
  its label embedding; the discriminator is from there too.
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpifed.models import keras


def latent_generator(noise: int, classes: int, hidden: int, latent: int, *, embedding: bool = False) -> nn.Module:
    """FedGen's: `[noise | one-hot label]` -> linear -> batch norm -> ReLU -> linear -> `[batch, latent]`, unbounded.

    With `embedding` a learned vector of length `noise` stands in for the one-hot label. On MNIST (32, 10, 256, 32) it
    has 19,744 parameters and 512 running statistics.
    """
    return LatentGenerator(noise, classes, hidden, latent, embedding)


class LatentGenerator(nn.Module):
    """See `latent_generator`."""

    def __init__(self, noise: int, classes: int, hidden: int, latent: int, embedding: bool) -> None:
        super().__init__()
        self.classes = classes
        self.embedding = nn.Embedding(classes, noise) if embedding else None
        self.linear1 = nn.Linear(noise + (noise if embedding else classes), hidden)
        self.norm1 = nn.BatchNorm1d(hidden)
        self.linear2 = nn.Linear(hidden, latent)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Noise `[batch, noise]`, int64 labels `[batch]` -> latent representations `[batch, latent]`."""
        label = _one_hot(labels, self.classes) if self.embedding is None else self.embedding(labels)
        hidden = self.norm1(self.linear1(torch.cat([noise, label], dim=1)))
        return self.linear2(functional.relu(hidden))


def image_generator(noise: int, classes: int, image_shape: tuple[int, int, int], *, channels: int = 64) -> nn.Module:
    """FedFTG's: noise and label to a small map each, then twice as large and convolved, twice over.

    Its images `[batch, *image_shape]` are in the classifier's input space, standardised: the last layer is a batch
    normalisation without weights, after a tanh. `image_shape` is (channels, height, width); height and width are
    multiples of 4, or `ValueError`. 682,499 parameters at (100, 10, (3, 32, 32)).
    """
    if len(image_shape) != 3 or image_shape[1] % 4 or image_shape[2] % 4:
        raise ValueError(f"the generator makes images (channels, height, width) in multiples of 4, not {image_shape}")
    return ImageGenerator(noise, classes, image_shape, channels)


class ImageGenerator(nn.Module):
    """See `image_generator`."""

    def __init__(self, noise: int, classes: int, image_shape: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        colours, height, width = image_shape
        self.classes = classes
        self.start = (2 * channels, height // 4, width // 4)
        self.from_noise = nn.Linear(noise, prod(self.start) // 2)
        self.from_label = nn.Linear(classes, prod(self.start) // 2)
        self.body = nn.Sequential(
            OrderedDict(
                norm0=nn.BatchNorm2d(2 * channels),
                larger1=nn.Upsample(scale_factor=2),
                conv1=nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
                norm1=nn.BatchNorm2d(2 * channels),
                relu1=nn.LeakyReLU(0.2),
                larger2=nn.Upsample(scale_factor=2),
                conv2=nn.Conv2d(2 * channels, channels, 3, padding=1),
                norm2=nn.BatchNorm2d(channels),
                relu2=nn.LeakyReLU(0.2),
                conv3=nn.Conv2d(channels, colours, 3, padding=1),
                tanh=nn.Tanh(),
                norm3=nn.BatchNorm2d(colours, affine=False),
            )
        )

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Noise `[batch, noise]`, int64 labels `[batch]` -> standardised images `[batch, *image_shape]`."""
        parts = [self.from_noise(noise), self.from_label(_one_hot(labels, self.classes))]
        return self.body(torch.cat(parts, dim=1).view(-1, *self.start))


def faug_generator(noise: int, classes: int, image_shape: tuple[int, ...]) -> nn.Module:
    """FAug's: noise times a learned vector of the label, then 256, 512 and 1,024 units, to pixels in [-1, 1].

    At (100, 10, (1, 28, 28)) layers and batch normalisations hold 1,493,520 numbers, running statistics included, which
    is what the paper counts; the label's embedding has 1,000 more. Keras' initial weights and batch normalisation,
    with the momentum 0.8 of that code.
    """
    return keras.initialise(FAugGenerator(noise, classes, image_shape))


class FAugGenerator(nn.Module):
    """See `faug_generator`."""

    def __init__(self, noise: int, classes: int, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.embedding = nn.Embedding(classes, noise)
        self.body = nn.Sequential()
        width = noise
        for number, units in enumerate((256, 512, 1024), start=1):
            self.body.add_module(f"linear{number}", nn.Linear(width, units))
            self.body.add_module(f"relu{number}", nn.LeakyReLU(0.2))
            self.body.add_module(f"norm{number}", nn.BatchNorm1d(units, eps=keras.EPSILON, momentum=0.2))
            width = units
        self.body.add_module("pixels", nn.Linear(width, prod(image_shape)))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Noise `[batch, noise]`, int64 labels `[batch]` -> images `[batch, *image_shape]` in [-1, 1]."""
        return torch.tanh(self.body(noise * self.embedding(labels))).view(-1, *self.image_shape)


def faug_discriminator(classes: int, image_shape: tuple[int, ...], *, dropout: float = 0.4) -> nn.Module:
    """The counterpart of `faug_generator`: `(images [batch, *image_shape] in [-1, 1], labels [batch]) -> [batch]`.

    The answer is a logit, above 0 where the image seems a real one of that label (the code it follows ends in a
    sigmoid): train with `binary_cross_entropy_with_logits`. Three layers of 512 units.
    """
    return keras.initialise(FAugDiscriminator(classes, image_shape, dropout))


class FAugDiscriminator(nn.Module):
    """See `faug_discriminator`."""

    def __init__(self, classes: int, image_shape: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        pixels = prod(image_shape)
        self.embedding = nn.Embedding(classes, pixels)
        self.body = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(pixels, 512),
                relu1=nn.LeakyReLU(0.2),
                linear2=nn.Linear(512, 512),
                relu2=nn.LeakyReLU(0.2),
                dropout2=nn.Dropout(dropout),
                linear3=nn.Linear(512, 512),
                relu3=nn.LeakyReLU(0.2),
                dropout3=nn.Dropout(dropout),
                logit=nn.Linear(512, 1),
            )
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images `[batch, *image_shape]` in [-1, 1], int64 labels `[batch]` -> logits `[batch]`, "is it real"."""
        return self.body(images.flatten(1) * self.embedding(labels)).squeeze(1)


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    return functional.one_hot(labels, classes).to(torch.float32)
