"""FedFTG's losses and weights on numbers that can be worked out by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor, nn

from mpifed.learning.fine_tuning import (
    Settings,
    distillation_loss,
    fidelity,
    label_batches,
    model_discrepancy,
    train_generator,
    train_student,
)
from mpifed.learning.generation import label_weights
from mpifed.models.flat import FlatModel
from mpifed.rng import torch_generator

pytestmark = pytest.mark.golden

COUNTS = torch.tensor([[3, 0, 1], [1, 4, 0]])  # clients 0 and 1; nobody is without, class 2 is client 0's alone


def logits(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log()


def class_weights(labels: Tensor) -> Tensor:
    """`[clients, samples]`"""
    return label_weights(COUNTS)[:, labels]


def test_class_weights_follow_the_counts() -> None:
    """Class 0: 3/4 and 1/4; class 1: 0 and 1; class 2: 1 and 0. Columns add up to 1."""
    weights = class_weights(torch.tensor([0, 1, 2, 0]))
    assert torch.equal(weights, torch.tensor([[0.75, 0.0, 1.0, 0.75], [0.25, 1.0, 0.0, 0.25]]))


def test_labels_follow_the_counts_of_the_rounds_clients() -> None:
    """Shares 4/9, 4/9, 1/9 of 90 places: 40, 40 and 10 exactly, shuffled; drawn, about so many, and never class 3."""
    counts = torch.cat([COUNTS, torch.zeros(2, 1, dtype=torch.int64)], dim=1)
    proportional = torch.cat(label_batches(counts, 9, 10, "proportional", torch_generator(0, "labels")))
    assert torch.bincount(proportional, minlength=4).tolist() == [40, 40, 10, 0]
    assert not torch.equal(proportional, proportional.sort().values)
    sampled = torch.cat(label_batches(counts, 90, 10, "sampled", torch_generator(0, "labels")))
    found = torch.bincount(sampled, minlength=4) / 900
    assert found[3] == 0 and (found[:3] - torch.tensor([4 / 9, 4 / 9, 1 / 9])).abs().max() < 0.05
    assert [len(part) for part in label_batches(counts, 9, 10, "proportional", torch_generator(0, "labels"))] == [
        10
    ] * 9


def test_proportional_labels_are_cut_by_the_cumulated_shares() -> None:
    """Shares 1/2, 1/3, 1/6 of 10 places end at 5, 8.33 -> 8, and 10: 5, 3 and 2."""
    labels = torch.cat(label_batches(torch.tensor([[3, 2, 1]]), 1, 10, "proportional", torch_generator(0, "labels")))
    assert torch.bincount(labels).tolist() == [5, 3, 2]


def test_discrepancy_is_weighted_by_teacher_and_sample() -> None:
    """Two samples, one teacher of weights 1/2 and 1. Student (1/2, 1/2) at both; teacher (1/2, 1/2) and (3/4, 1/4).

    KL(teacher || student): 0, and 3/4 log(3/2) + 1/4 log(1/2) = 0.130812; mean of the weighted: 0.0654060.
    L1 of logits log p: 0, and (log(3/2) + log(2)) / 2 = log(3)/2 = 0.549306; mean of the weighted: 0.274653.
    """
    student = torch.stack([logits(0.5, 0.5)] * 2)
    teachers = torch.stack([logits(0.5, 0.5), logits(0.75, 0.25)])[None]
    weights = torch.tensor([[0.5, 1.0]])
    kl = 0.75 * log(1.5) + 0.25 * log(0.5)
    assert model_discrepancy(student, teachers, weights, "kl").tolist() == pytest.approx([kl / 2])
    assert model_discrepancy(student, teachers, weights, "l1").tolist() == pytest.approx([log(3) / 4])


def test_fidelity_of_a_client_without_the_class() -> None:
    """Teacher 0 says (1/2, 1/4, 1/4), teacher 1 (1/8, 3/4, 1/8), of two samples labelled 0 and 2.

    Weights of class 0: 3/4, 1/4; of class 2: 1, 0.
    sample: teacher 0: (3/4 log 2 + log 4) / 2; teacher 1: (1/4 log 8 + 0) / 2, as it never saw class 2.
    mean: teacher 0: (log 2 + log 4) / 2 * 7/8; teacher 1: (log 8 + log 8) / 2 * 1/8: there class 2 counts.
    """
    teachers = torch.stack([logits(0.5, 0.25, 0.25).expand(2, 3), logits(0.125, 0.75, 0.125).expand(2, 3)])
    labels = torch.tensor([0, 2])
    weights = class_weights(labels)
    sample = [(0.75 * log(2) + log(4)) / 2, 0.25 * log(8) / 2]
    assert fidelity(teachers, labels, weights, "sample").tolist() == pytest.approx(sample)
    mean = [(log(2) + log(4)) / 2 * 7 / 8, log(8) / 8]
    assert fidelity(teachers, labels, weights, "mean").tolist() == pytest.approx(mean)


def test_the_students_loss_has_the_gradient_of_the_weighted_kl() -> None:
    """sum_k alpha_k KL(p_k || q) and the cross-entropy to sum_k alpha_k p_k differ by a constant; `element` by 1/C."""
    random = torch.Generator().manual_seed(0)
    teachers = torch.randn(2, 4, 3, generator=random)
    weights = class_weights(torch.tensor([0, 1, 2, 0]))
    target = (weights[:, :, None] * teachers.softmax(dim=2)).sum(dim=0)
    gradients = []
    for loss in (
        lambda q: distillation_loss(q, target, "batch"),
        lambda q: model_discrepancy(q, teachers, weights, "kl").sum(),
        lambda q: 3 * distillation_loss(q, target, "element"),
    ):
        student = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss(student).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


# --- the players ------------------------------------------------------------------------------------------------------
class Recorder:
    """An optimiser that only writes down what it is given."""

    def __init__(self) -> None:
        self.gradients: list[list[float]] = []

    def step(self, gradients: list[Tensor]) -> None:
        self.gradients.append([round(float(g), 6) for gradient in gradients for g in gradient.reshape(-1)])


def settings(**changes: object) -> Settings:
    values = dict(
        discrepancy="l1",
        teacher_gradient=False,
        fidelity_weighting="sample",
        fidelity_weight=0.0,
        diversity_weight=0.0,
        diversity="mean",
        generator_update="joint",
        student_reduction="batch",
        batch_norm="train",
    )
    return Settings(**(values | changes))  # type: ignore[arg-type]


class Shift(nn.Module):
    """Images are `a` plus noise; a model puts out its input times `w` for both classes."""

    def __init__(self, w: tuple[float, float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def generator_gradients(**changes: object) -> list[list[float]]:
    """Of the generator's only parameter a, at a = 1, noise 0: one sample of label 0, x = a.

    Student logits (0, 0); teacher 0 (2x, 0) of weight 3/4, teacher 1 (0, 4x) of weight 1/4. The distances of the logits
    are 2x/2 = x and 4x/2 = 2x.
    """
    a = torch.ones(1, requires_grad=True)
    student, recorder = FlatModel(Shift((0.0, 0.0))), Recorder()
    slopes = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    train_generator(
        lambda noise, labels: (a + noise).expand(2, 1),
        [a],
        recorder,
        student,
        lambda images, some: images[None] * slopes[some, None, :],
        torch.zeros(2, 1),
        torch.tensor([0, 0]),
        class_weights(torch.tensor([0, 0])),
        settings(**changes),
    )
    return recorder.gradients


def test_the_generator_looks_for_disagreement() -> None:
    """d/da of -(3/4 x + 1/4 2x) is -1.25 where the gradient goes through the teachers; 0 where it is cut, since the
    student is flat; one step, or one for each teacher (-0.75, then -0.5)."""
    assert generator_gradients(teacher_gradient=True) == [[-1.25]]
    assert generator_gradients(teacher_gradient=False) == [[0.0]]
    assert generator_gradients(teacher_gradient=True, generator_update="per_client") == [[-0.75], [-0.5]]


def test_the_generator_makes_images_that_the_teachers_know() -> None:
    """CE of label 0 at x = 1: teacher 0 log(1 + e^-2x), slope -2/(1 + e^2); teacher 1 log(1 + e^4x), 4/(1 + e^-4)."""
    first, second = -2 / (1 + 2.718281828**2), 4 / (1 + 2.718281828**-4)
    (joint,) = generator_gradients(fidelity_weight=1.0)
    assert joint == pytest.approx([0.75 * first + 0.25 * second], abs=1e-5)
    each = generator_gradients(fidelity_weight=1.0, generator_update="per_client")
    assert [value for (value,) in each] == pytest.approx([0.75 * first, 0.25 * second], abs=1e-5)


def test_every_teachers_step_has_its_share_of_the_diversity() -> None:
    """Images a and 0 at a = 1, noise 1 and 0: L_dis = exp(-2 a / 4), slope -exp(-1/2)/2; with two steps half of it in
    each. Nothing else has a gradient: the student is flat, and the teachers' is cut."""
    for update, share in (("joint", [1.0]), ("per_client", [0.5, 0.5])):
        a, recorder, noise = torch.ones(1, requires_grad=True), Recorder(), torch.tensor([[1.0], [0.0]])
        train_generator(
            lambda noise, labels, a=a: a * noise,
            [a],
            recorder,
            FlatModel(Shift((0.0, 0.0))),
            lambda images, some: images[None] * torch.ones(2, 1, 2)[some],
            noise,
            torch.tensor([0, 0]),
            torch.full((2, 2), 0.5),
            settings(diversity_weight=1.0, generator_update=update),
        )
        assert [value for (value,) in recorder.gradients] == pytest.approx(
            [-exp(-0.5) / 2 * s for s in share], abs=1e-6
        )


@pytest.mark.parametrize(("policy", "moves"), [("train", True), ("restored", False), ("frozen", False)])
def test_running_statistics_by_policy(policy: str, moves: bool) -> None:
    student = FlatModel(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))
    before, recorder = student.buffers.clone(), Recorder()
    images = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)) + 5.0
    train_student(student, recorder, images, torch.full((6, 2), 0.5), 3, settings(batch_norm=policy))
    assert torch.equal(student.buffers, before) != moves
    assert len(recorder.gradients) == 3
