"""The two losses of FedGen: of the generator in latent space at the server, and of a client that it regularises.

Letters of shapes: K clients, B samples, C classes, z features of the latent space (what a head is given), n noise.

Zhu, Hong, Zhou, ICML 2021, arXiv 2105.10056: equations 4 and 5; and the authors' code (docs/algorithms/fedgen.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpifed.algorithms.base import Model
from mpifed.learning.distillation import kl_divergence
from mpifed.learning.generation import Noise, diversity_loss, draw_noise, sample_labels
from mpifed.learning.local import Optimizer

EnsembleLoss = Literal["mean_logits", "weighted_ce", "mean_weight_ce"]


# --- server -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Heads:
    """The clients' heads, all at once."""

    weights: Tensor  # [K, C, z]
    biases: Tensor  # [K, C]

    def __call__(self, latent: Tensor) -> Tensor:
        """`[B, z]` -> logits `[K, B, C]`, by one product of matrices however many clients there are."""
        k, c, z = self.weights.shape
        logits = F.linear(latent, self.weights.reshape(k * c, z), self.biases.reshape(k * c))
        return logits.view(-1, k, c).transpose(0, 1)


@dataclass(frozen=True)
class GeneratorLoss:
    """What the server minimises in the generator's parameters (see `mpifed.algorithms.fedgen.FedGen`)."""

    ensemble: EnsembleLoss
    teacher_weight: float
    student_weight: float
    diversity_weight: float

    def __call__(
        self, noise: Tensor, latent: Tensor, labels: Tensor, heads: Heads, omega: Tensor, student: Heads
    ) -> Tensor:
        """The loss of one batch, a scalar.

        `latent` `[B, z]` made of `noise` `[B, n]` and `labels` `[B]`; `omega` `[K, C]`, each client's say by label;
        `student` the head of the one global model, as `Heads` of K = 1.
        """
        logits = heads(latent)
        weights = omega[:, labels]  # [K, B]
        loss = self.teacher_weight * teacher_loss(logits, labels, weights, self.ensemble)
        if self.student_weight:
            blend = logits.mean(dim=0) if self.ensemble == "mean_logits" else (weights[:, :, None] * logits).sum(dim=0)
            # mean over samples and classes, as the authors have it
            loss = loss - self.student_weight * kl_divergence(student(latent)[0], blend) / logits.shape[2]
        if self.diversity_weight:
            loss = loss + self.diversity_weight * diversity_loss(noise, latent)
        return loss


def teacher_loss(logits: Tensor, labels: Tensor, weights: Tensor, ensemble: EnsembleLoss) -> Tensor:
    """Do the clients' heads together see the label? `logits` `[K, B, C]`, `labels` `[B]`, `weights` `[K, B]`.

    `mean_logits`: the cross-entropy of the mean of all logits (equation 4). `weighted_ce`: the mean over the batch of
    the clients' cross-entropies, weighted by label (what the authors' code means). `mean_weight_ce`: what it computes,
    each client's mean cross-entropy times its mean weight, since weights `[B, 1]` meet entropies `[B]` there and make a
    product `[B, B]`; a client then has its say about labels that it never had.
    """
    if ensemble == "mean_logits":
        return F.cross_entropy(logits.mean(dim=0), labels)
    k, b, c = logits.shape
    entropy = F.cross_entropy(logits.reshape(k * b, c), labels.repeat(k), reduction="none").view(k, b)
    if ensemble == "mean_weight_ce":
        return (weights.mean(dim=1) * entropy.mean(dim=1)).sum()
    return (weights * entropy).sum(dim=0).mean()


def train_generator(
    generator: Model,
    optimizer: Optimizer,
    loss: GeneratorLoss,
    heads: Heads,
    omega: Tensor,
    student: Heads,
    prior: Tensor,
    *,
    steps: int,
    batch_size: int,
    noise: tuple[Noise, int],
    random: torch.Generator,
) -> None:
    """`steps` updates of the loaded `generator`, in training mode, each on a new batch of labels from `prior` `[C]`."""
    device = prior.device
    generator.train()
    for _ in range(steps):
        labels = sample_labels(prior, batch_size, random).to(device)
        drawn = draw_noise(noise[0], batch_size, noise[1], random).to(device)
        generator.drop_gradient()
        latent = generator.module(drawn, labels)
        loss(drawn, latent, labels, heads, omega, student).backward()
        optimizer.step(generator.gradients())


# --- client -----------------------------------------------------------------------------------------------------------
@dataclass
class RegularisedLoss:
    """The objective of one client in one round, for `mpifed.learning.local.local_training`.

    J = CE(x, y) + a CE(h(G(y')), y') + b KL(h(G(y)) || x): on generated latent representations of labels y' from the
    prior the head shall see them (equation 5, a); and on real samples the model shall answer as the head does on a
    generated representation of the same label (b; the authors' code alone, target detached).

    Only the first `steps` steps are regularised (0: all); it keeps the `labels` of the batches that it sees.
    """

    split: Callable[[nn.Module], tuple[Callable[[Tensor], Tensor], nn.Linear]]
    generator: Model | None  # loaded, in evaluation mode; None: nothing is generated
    prior: Tensor  # [C]
    generated_weight: float  # a
    latent_kl_weight: float  # b
    steps: int
    batch_size: int  # of generated samples
    noise: tuple[Noise, int]
    random: torch.Generator

    def __post_init__(self) -> None:
        self.labels: list[Tensor] = []

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        self.labels.append(y)
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        if self.generator is None or (self.steps and len(self.labels) > self.steps):
            return loss
        _, head = self.split(model.module)
        drawn = sample_labels(self.prior, self.batch_size, self.random).to(y.device)
        latent = self._generate(self.generator, torch.cat([drawn, y] if self.latent_kl_weight else [drawn]))
        loss = loss + self.generated_weight * F.cross_entropy(head(latent[: len(drawn)]), drawn)
        if self.latent_kl_weight:
            with torch.no_grad():
                target = head(latent[len(drawn) :])
            loss = loss + self.latent_kl_weight * kl_divergence(logits, target)
        return loss

    def _generate(self, generator: Model, labels: Tensor) -> Tensor:
        noise = draw_noise(self.noise[0], len(labels), self.noise[1], self.random).to(labels.device)
        with torch.no_grad():
            return generator.module(noise, labels)

    def seen(self, classes: int) -> Tensor:
        """How often every label was in a batch so far, int64 `[classes]`."""
        return torch.bincount(torch.cat(self.labels), minlength=classes)
