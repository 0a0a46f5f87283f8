"""The losses of FedGen, FedEnsemble and FedDF on tensors of a few numbers, worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpifed.learning.distillation import distil
from mpifed.learning.evaluate import evaluate
from mpifed.learning.latent import GeneratorLoss, Heads, RegularisedLoss, teacher_loss, train_generator
from mpifed.learning.local import Adam
from mpifed.models.classifier import split
from mpifed.models.flat import FlatModel
from mpifed.rng import torch_generator
from tests.toy import Prior, close

pytestmark = pytest.mark.golden
LOG3 = math.log(3.0)


# --- FedGen: the server -----------------------------------------------------------------------------------------------
LOGITS = torch.tensor([[[0.0, 0.0]], [[2 * LOG3, 0.0]]])
"""Two clients, one sample, two classes: the clients say (1/2, 1/2) and (9/10, 1/10)."""


def test_the_teachers_of_the_paper_agree_first() -> None:
    """Mean logits (log 3, 0): (3/4, 1/4), so the cross-entropy of label 0 is log(4/3). The weights do not count."""
    for weights in ([[0.5], [0.5]], [[0.0], [1.0]]):
        loss = teacher_loss(LOGITS, torch.tensor([0]), torch.tensor(weights), "mean_logits")
        assert loss.item() == pytest.approx(math.log(4 / 3))


def test_the_teachers_of_the_code_are_heard_one_by_one() -> None:
    """Cross-entropies log 2 and log(10/9), weights 1/4 and 3/4."""
    loss = teacher_loss(LOGITS, torch.tensor([0]), torch.tensor([[0.25], [0.75]]), "weighted_ce")
    assert loss.item() == pytest.approx(0.25 * math.log(2) + 0.75 * math.log(10 / 9))


def test_the_teachers_weights_are_those_of_each_samples_label() -> None:
    """A second sample, of label 1, for which both say the same: cross-entropies log 2 and log 10, weights 1 and 0.

    Mean over the batch: (1/4 log 2 + 3/4 log(10/9) + log 2) / 2.
    """
    logits = LOGITS.expand(2, 2, 2)
    loss = teacher_loss(logits, torch.tensor([0, 1]), torch.tensor([[0.25, 1.0], [0.75, 0.0]]), "weighted_ce")
    assert loss.item() == pytest.approx((0.25 * math.log(2) + 0.75 * math.log(10 / 9) + math.log(2)) / 2)


def test_the_letter_of_the_code_averages_weights_before_they_weigh() -> None:
    """The same two samples. The authors multiply cross-entropies [B] by weights [B, 1], and take the mean of [B, B].

    Client 0: mean weight (1/4 + 1)/2 = 5/8, mean cross-entropy (log 2 + log 2)/2; client 1: 3/8 and
    (log(10/9) + log 10)/2, though it has no say about label 1.
    """
    logits, labels = LOGITS.expand(2, 2, 2), torch.tensor([0, 1])
    weights = torch.tensor([[0.25, 1.0], [0.75, 0.0]])
    loss = teacher_loss(logits, labels, weights, "mean_weight_ce")
    assert loss.item() == pytest.approx(5 / 8 * math.log(2) + 3 / 16 * (math.log(10 / 9) + math.log(10)))
    entropies = [nn.functional.cross_entropy(of_client, labels, reduction="none") for of_client in logits]
    letter = sum((entropy * weight.reshape(-1, 1)).mean() for entropy, weight in zip(entropies, weights, strict=True))
    assert loss.item() == pytest.approx(float(letter))


def test_all_terms_of_the_generators_loss() -> None:
    """Heads of one feature, two classes: client 0 ignores it, client 1 multiplies it by (1, 0). Two samples of label 0
    with latent 2 log 3 and 0, noise 0 and 2.

    Teacher loss with weights 1/4 and 3/4: the first sample's is 1/4 log 2 + 3/4 log(10/9) as above, the second's log 2.
    Diversity: mean absolute difference 2 log 3 = 2.197225, mean square of the noise 4, over two of four pairs:
    exp(-2 log 3 * 4 / 2) = 3^-4 = 1/81.
    Student (1, 0) times 0, so (1/2, 1/2): blends 3/4 (2 log 3, 0) and (0, 0), softmax of the first
    (3 sqrt 3, 1) / (3 sqrt 3 + 1) = (p, 1 - p); KL of it to (1/2, 1/2) is log 2 + p log p + (1 - p) log(1 - p), the
    second's is 0; mean over two samples and two classes.
    """
    heads = Heads(torch.tensor([[[0.0], [0.0]], [[1.0], [0.0]]]), torch.zeros(2, 2))
    student = Heads(torch.zeros(1, 2, 1), torch.zeros(1, 2))
    latent, noise = torch.tensor([[2 * LOG3], [0.0]]), torch.tensor([[0.0], [2.0]])
    omega, labels = torch.tensor([[0.25, 1.0], [0.75, 0.0]]), torch.tensor([0, 0])
    teacher = (0.25 * math.log(2) + 0.75 * math.log(10 / 9) + math.log(2)) / 2
    p = 3 * math.sqrt(3) / (3 * math.sqrt(3) + 1)
    disagreement = (math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)) / 4

    def loss(*weights: float) -> float:
        return GeneratorLoss("weighted_ce", *weights)(noise, latent, labels, heads, omega, student).item()

    assert loss(1.0, 0.0, 0.0) == pytest.approx(teacher)
    assert loss(0.0, 0.0, 1.0) == pytest.approx(1 / 81)
    assert loss(0.0, 1.0, 0.0) == pytest.approx(-disagreement)
    assert loss(2.0, 3.0, 4.0) == pytest.approx(2 * teacher - 3 * disagreement + 4 / 81)


class Constant(nn.Module):
    """A generator that makes its one parameter, whatever it is asked for."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([[value]]))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self.value.expand(len(labels), 1)


def test_a_step_of_the_generator() -> None:
    """Both heads multiply by (1, 0), so that a larger latent looks more like label 0. Adam's first step is its step
    size 0.1 against the sign of the gradient, and label 0 alone is in the prior: 0.5 becomes 0.6, then 0.7."""
    generator = FlatModel(Constant(0.5))
    heads = Heads(torch.tensor([[[1.0], [0.0]]] * 2), torch.zeros(2, 2))

    class NoDecay:
        weight_decay = 0.0

    adam = Adam(list(generator.layout.views(generator.parameters.detach()).values()), NoDecay(), 0.1)
    options: dict[str, Any] = {"batch_size": 4, "noise": ("normal", 3), "random": torch_generator(0, "generator")}
    loss = GeneratorLoss("mean_logits", 1.0, 0.0, 1.0)
    for expected in (0.6, 0.7):
        train_generator(
            generator, adam, loss, heads, torch.ones(2, 2) / 2, heads, torch.tensor([1.0, 0.0]), steps=1, **options
        )
        close(generator.parameters.detach(), [expected], 1e-3)


# --- FedGen: a client -------------------------------------------------------------------------------------------------
class OneFeature(nn.Module):
    """`features` is the input, the head's weights are (1, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 2, bias=False)
        self.head.weight.data = torch.tensor([[1.0], [0.0]])

    def features(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def regularised(a: float, b: float, steps: int = 0) -> RegularisedLoss:
    """A generator that makes log 3, and a prior of label 0 alone."""
    generator = FlatModel(Constant(LOG3))
    random = torch_generator(0, "generated")
    return RegularisedLoss(split, generator, torch.tensor([1.0, 0.0]), a, b, steps, 4, ("normal", 3), random)


def test_a_regularised_step() -> None:
    """A sample 0 of label 1: logits (0, 0), cross-entropy log 2, with no gradient in the head as the feature is 0.

    The head says (3/4, 1/4) to generated log 3: cross-entropy log(4/3) of label 0, gradient (3/4 - 1, 1/4) log 3; and
    KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 log(3/2) + 1/4 log(1/2), with no gradient in the head: none at the feature 0, and
    the target is a constant. With a = 2, b = 5.
    """
    model, loss = FlatModel(OneFeature()), regularised(2.0, 5.0)
    value = loss(model, torch.zeros(1, 1), torch.tensor([1]))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert value.item() == pytest.approx(math.log(2) + 2 * math.log(4 / 3) + 5 * kl)
    value.backward()
    close(model.gradient, [-0.5 * LOG3, 0.5 * LOG3])


class ByLabel(nn.Module):
    """A generator that makes log 3 for label 0, and 0 for label 1."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor([[LOG3], [0.0]]))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self.values[labels]


def test_a_sample_is_compared_with_what_is_generated_for_its_own_label() -> None:
    """Though the prior knows label 0 alone: a sample 0 of label 1, logits (0, 0), meets the head's answer (1/2, 1/2) to
    generated 0, of label 0 the (3/4, 1/4) to log 3. The head's own term is log(4/3) for both."""
    random = torch_generator(0, "generated")
    loss = RegularisedLoss(split, FlatModel(ByLabel()), torch.tensor([1.0, 0.0]), 2.0, 5.0, 0, 4, ("normal", 3), random)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    values = [loss(FlatModel(OneFeature()), torch.zeros(1, 1), torch.tensor([label])).item() for label in (1, 0)]
    assert values == pytest.approx([math.log(2) + 2 * math.log(4 / 3) + 5 * more for more in (0.0, kl)])


def test_no_more_than_the_first_steps_are_regularised() -> None:
    """log 2 + log(4/3) twice, then log 2; and the labels of all batches are counted."""
    model, loss = FlatModel(OneFeature()), regularised(1.0, 0.0, steps=2)
    values = [loss(model, torch.zeros(2, 1), torch.tensor([1, label])).item() for label in (0, 1, 1)]
    with_it, without = math.log(2) + math.log(4 / 3), math.log(2)
    assert values == pytest.approx([with_it, with_it, without])
    assert loss.seen(3).tolist() == [1, 5, 0]


# --- FedEnsemble ------------------------------------------------------------------------------------------------------
def test_a_weighted_ensemble() -> None:
    """Logits (2, 0) once and (0, 4) three times: mean (1/2, 3), so class 1; its loss is log(1 + e^(1/2 - 3))."""
    model = FlatModel(Prior([0.0, 0.0]))
    members = [(torch.tensor(logits), torch.empty(0)) for logits in ([2.0, 0.0], [0.0, 4.0])]
    tested = evaluate(model, torch.zeros(2, 1), torch.tensor([1, 1]), 2, members=members, weights=(1.0, 3.0))
    assert tested.correct == 2
    assert tested.loss == pytest.approx(math.log(1 + math.exp(-2.5)))


# --- FedDF ------------------------------------------------------------------------------------------------------------
def distilled(start: list[float], teacher: list[float], **options: Any) -> tuple[Tensor, int, list[int]]:
    """The student's logits after `distil`, the steps that it took, and the samples that the teacher was asked for."""
    student, asked = FlatModel(Prior(start)), []

    def answer(x: Tensor) -> Tensor:
        asked.extend(int(value) for value in x[:, 0])
        return torch.tensor(teacher).expand(len(x), -1)

    everything: dict[str, Any] = {"steps": 1, "batch_size": 3, "lr": 0.1, "patience": 100, "measure_every": 1}
    student.train()
    steps = distil(
        student,
        answer,
        lambda indices: indices[:, None].float(),
        torch.arange(7),
        torch.arange(7, 9),
        random=torch_generator(0, "batches"),
        **(everything | options),
    )
    return student.parameters.detach(), steps, asked


def test_a_step_of_distillation() -> None:
    """Student (0, 0), teacher (log 3, 0): the gradient is (1/2 - 3/4, 1/2 - 1/4), so Adam's first step (0.1, -0.1)."""
    student, steps, _ = distilled([0.0, 0.0], [LOG3, 0.0])
    close(student, [0.1, -0.1], 1e-5)
    assert steps == 1


def test_the_step_size_falls_by_half_a_cosine() -> None:
    """0.1 (1 + cos(pi s / 3)) / 2 for s = 0, 1, 2: 0.1, 0.075, 0.025; Adam moves by about that much while the gradient
    hardly changes, here far from a distant teacher."""
    student, _, _ = distilled([0.0, 0.0], [50.0, 0.0], steps=3)
    close(student, [0.2, -0.2], 2e-3)


def test_distillation_stops_where_nothing_improves_and_keeps_the_best() -> None:
    """The student is the teacher already, and every step leads away from it (0.1 by Adam, on rounding errors)."""
    student, steps, _ = distilled([LOG3, 0.0], [LOG3, 0.0], steps=50, patience=4, measure_every=2)
    close(student, [LOG3, 0.0], 0.0)
    assert steps == 4


def test_distillation_finds_the_teacher_and_asks_it_once_for_each_sample() -> None:
    student, _, asked = distilled([0.0, 0.0, 1.0], [LOG3, 0.0, 0.0], steps=200, measure_every=10)
    close((student - student[1]).detach(), [LOG3, 0.0, 0.0], 0.01)
    assert sorted(asked) == list(range(9))
