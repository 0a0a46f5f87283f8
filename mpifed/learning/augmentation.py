"""A conditional GAN from a few samples of each label, and samples drawn from it: the learning of FAug.

Jeong, Oh, Kim, Park, Bennis, Kim, 2018, arXiv 1811.11479, which says no more than that it is a conditional GAN trained
on oversampled seeds; losses and settings are those of the public code whose generator has the paper's size (Keras-GAN's
cgan). Samples here are in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mpifed.algorithms.base import Auxiliary, Model
from mpifed.learning.local import Adam, parts_of, seed_dropout


@dataclass(frozen=True)
class Adversarial:
    """How a conditional GAN is trained."""

    steps: int
    batch_size: int
    lr: float
    noise: int
    """Length of the generator's noise."""
    shift: int
    """Oversampling: seeds are moved by up to so many pixels in each direction,"""
    jitter: float
    """and normal noise of this standard deviation is added."""
    weight_decay: float = 0.0


def oversampled(samples: Tensor, shift: int, jitter: float, random: torch.Generator) -> Tensor:
    """Variations of samples `[n, ...]` in [-1, 1]: images `[n, c, h, w]` shifted at random, what comes in being -1."""
    if shift and samples.dim() == 4:
        height, width = samples.shape[2:]
        padded = F.pad(samples, (shift,) * 4, value=-1.0)
        corners = torch.randint(0, 2 * shift + 1, (len(samples), 2), generator=random).tolist()
        samples = torch.stack(
            [one[:, top : top + height, left : left + width] for one, (top, left) in zip(padded, corners, strict=True)]
        )
    noise = torch.randn(samples.shape, generator=random).to(samples.device)
    return (samples + jitter * noise).clamp(-1.0, 1.0)


def train_conditional_gan(
    generator: Auxiliary,
    discriminator: Auxiliary,
    seeds: Tensor,
    labels: Tensor,
    settings: Adversarial,
    random: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The generator's parameters `[g]` and buffers, trained from their initial values on `seeds` `[n, ...]` in [-1, 1].

    Each step draws labels evenly among those of the seeds, `[n]` int64, and a seed of each; the discriminator learns to
    tell its variation from what the generator makes of that label, then the generator to be taken for real.
    """
    made, judge = generator.model, discriminator.model
    for part in (generator, discriminator):
        part.model.load(part.parameters, part.buffers)
        part.model.train()
    steps = {model: Adam(parts_of(model), settings, settings.lr, (0.5, 0.999)) for model in (made, judge)}
    dropout = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=random)))  # of the judge
    seed_dropout(dropout, labels.device)
    weights = 1.0 / torch.bincount(labels.cpu())[labels.cpu()].double()

    def draw() -> Tensor:
        return torch.multinomial(weights, settings.batch_size, replacement=True, generator=random).to(labels.device)

    def imagine(wanted: Tensor) -> Tensor:
        noise = torch.randn(len(wanted), settings.noise, generator=random).to(labels.device)
        return made.module(noise, wanted)

    def verdict(samples: Tensor, wanted: Tensor, real: float) -> Tensor:
        logits = judge.module(samples, wanted)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))

    for _ in range(settings.steps):
        chosen = draw()
        wanted = labels[chosen]
        with torch.no_grad():
            imagined = imagine(wanted)
        real = oversampled(seeds[chosen], settings.shift, settings.jitter, random)
        judge.drop_gradient()
        ((verdict(real, wanted, 1.0) + verdict(imagined, wanted, 0.0)) / 2).backward()
        steps[judge].step(judge.gradients())

        wanted = labels[draw()]
        made.drop_gradient()
        verdict(imagine(wanted), wanted, 1.0).backward()
        steps[made].step(made.gradients())
    return made.parameters.detach().clone(), made.buffers.clone()


def generated(generator: Model, labels: Tensor, noise: int, random: torch.Generator) -> Tensor:
    """Samples in [-1, 1] of these labels, int64 `[n]`, from a generator that is loaded; in evaluation mode."""
    generator.eval()
    with torch.no_grad():
        return generator.module(torch.randn(len(labels), noise, generator=random).to(labels.device), labels)
