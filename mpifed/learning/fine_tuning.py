"""Fine-tuning a model on images that a generator makes, with the clients' models as teachers: the maths of FedFTG.

Letters of shapes: B samples of a batch, K teachers, C classes.

Zhang, Shen, Ding, Tao, Duan, CVPR 2022, arXiv 2203.09249: equations 7 to 10 and Algorithm 2, as far as its authors'
code, their answers to questions, and other papers that quote it tell of them (docs/algorithms/fedftg.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mpifed.algorithms.base import Model
from mpifed.learning.distillation import soft_cross_entropy
from mpifed.learning.generation import Distances, diversity_loss, label_prior, sample_labels

Discrepancy = Literal["kl", "l1"]
BatchNorm = Literal["train", "restored", "frozen"]


def label_batches(
    counts: Tensor, batches: int, size: int, draw: Literal["sampled", "proportional"], generator: torch.Generator
) -> list[Tensor]:
    """Labels int64 `[size]` of each batch, by p(y) ~ sum_k n_k^y (equation 9), on the CPU.

    `sampled` draws every label; `proportional` (the authors' code) shares all places of the round out by p, cut to
    whole numbers by the cumulated shares, and shuffles them.
    """
    places = batches * size
    if draw == "sampled":
        labels = sample_labels(label_prior(counts), places, generator)
    else:
        total = counts.to(torch.float64).sum(dim=0)
        ends = (
            (total.cumsum(0) / total.sum() * places + 1e-6).floor().to(torch.int64)
        )  # 1e-6: the last share ends at 1 - rounding
        labels = torch.searchsorted(ends, torch.arange(places), right=True)
        labels = labels[torch.randperm(places, generator=generator)]
    return list(labels.split(size))


# --- losses -----------------------------------------------------------------------------------------------------------
def model_discrepancy(student: Tensor, teachers: Tensor, weights: Tensor, kind: Discrepancy) -> Tensor:
    """How far the student is from each teacher, `[K]`: what the generator looks for, and the student removes.

    L_md of one teacher k, mean over the batch of alpha^{k,y} d(student, teacher_k), `d` being KL(teacher || student)
    of the softmax outputs (the paper) or the mean absolute difference of the logits (the authors' code).

    `student` logits `[B, C]`, `teachers` logits `[K, B, C]`, `weights` `[K, B]`.
    """
    if kind == "l1":
        distance = (student - teachers).abs().mean(dim=2)
    else:
        log_teachers = F.log_softmax(teachers, dim=2)
        distance = (log_teachers.exp() * (log_teachers - F.log_softmax(student, dim=1))).sum(dim=2)
    return (weights * distance).mean(dim=1)


def fidelity(teachers: Tensor, labels: Tensor, weights: Tensor, weighting: Literal["sample", "mean"]) -> Tensor:
    """L_cls of each teacher, `[K]`: do the teachers see the label that the generator was asked for?

    `sample`: mean over the batch of alpha^{k,y} CE(teacher_k, y) (the paper). `mean` (the authors' code): the plain
    mean of the cross-entropy times the mean weight, by which a client shapes images of classes that it never had.
    """
    k, b, c = teachers.shape
    entropy = F.cross_entropy(teachers.reshape(k * b, c), labels.repeat(k), reduction="none").view(k, b)
    if weighting == "sample":
        return (weights * entropy).mean(dim=1)
    return entropy.mean(dim=1) * weights.mean(dim=1)


def distillation_loss(student: Tensor, target: Tensor, reduction: Literal["batch", "element"]) -> Tensor:
    """Cross-entropy of the student to the ensemble's probabilities `[B, C]`; L_md of KL up to a constant.

    For the gradient, sum_k alpha^k KL(p_k || q) is the cross-entropy of q to sum_k alpha^k p_k. `element` divides by
    the classes too, as the authors' code does: a step C times smaller.
    """
    loss = soft_cross_entropy(student, target)
    return loss if reduction == "batch" else loss / student.shape[1]


# --- the two players --------------------------------------------------------------------------------------------------
class Step(Protocol):
    """Steps the tensors it was made for, in place (`mpifed.learning.local.Optimizer`)."""

    def step(self, gradients: list[Tensor]) -> None: ...


@dataclass(frozen=True)
class Settings:
    """The switches of both players (see `mpifed.algorithms.fedftg.FedFTG`)."""

    fidelity_weight: float
    diversity_weight: float
    discrepancy: Discrepancy
    teacher_gradient: bool
    fidelity_weighting: Literal["sample", "mean"]
    diversity: Distances
    generator_update: Literal["joint", "per_client"]
    student_reduction: Literal["batch", "element"]
    batch_norm: BatchNorm


Teachers = Callable[[Tensor, slice], Tensor]
"""Images `[B, ...]`, some of the K teachers -> their logits `[those, B, C]`, in evaluation mode, differentiable in the
images."""


def train_generator(
    generate: Callable[[Tensor, Tensor], Tensor],
    parameters: Sequence[Tensor],
    optimizer: Step,
    student: Model,
    teachers: Teachers,
    noise: Tensor,
    labels: Tensor,
    weights: Tensor,
    settings: Settings,
) -> None:
    """One update of the generator (max of equation 8): images on which student and teachers differ, that the teachers
    recognise, and that differ from each other.

    `joint` steps once on the sum over the teachers (the paper); `per_client` once for every teacher in turn, each with
    its share of the diversity loss (the authors' code; an optimiser such as Adam, which does not see the scale of a
    loss, then all but ignores the weights).

    `generate(noise [B, n], labels [B])` -> images, in training mode; `parameters` its tensors that `optimizer` steps.
    """
    student.eval()
    turns: Sequence[slice] = [slice(None)]
    if settings.generator_update == "per_client":
        turns = [slice(k, k + 1) for k in range(len(weights))]
    for turn in turns:
        images = generate(noise, labels)
        theirs, mine = teachers(images, turn), student(images)
        known = theirs if settings.teacher_gradient else theirs.detach()
        loss = -model_discrepancy(mine, known, weights[turn], settings.discrepancy).sum()
        loss = (
            loss + settings.fidelity_weight * fidelity(theirs, labels, weights[turn], settings.fidelity_weighting).sum()
        )
        loss = loss + settings.diversity_weight / len(turns) * diversity_loss(noise, images, settings.diversity)
        optimizer.step(list(torch.autograd.grad(loss, list(parameters))))


def train_student(
    student: Model,
    optimizer: Step,
    images: Tensor,
    target: Tensor,
    steps: int,
    settings: Settings,
) -> None:
    """`steps` updates of the student (min of equation 8) towards the ensemble's probabilities `target` `[B, C]`."""
    student.train(settings.batch_norm != "frozen")
    before = student.buffers.clone()
    for _ in range(steps):
        student.drop_gradient()
        distillation_loss(student(images), target, settings.student_reduction).backward()
        optimizer.step(student.gradients())
    if settings.batch_norm == "restored":
        student.buffers.copy_(before)
