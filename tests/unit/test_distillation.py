"""Losses to soft targets, by hand; and that many models at once answer as each does by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpifed.learning.distillation import ensemble_logits, kl_divergence, logit_loss, soft_cross_entropy
from mpifed.models import initialise
from mpifed.models.flat import FlatModel
from mpifed.rng import torch_generator
from mpifed.types import DataSpec
from tests.algorithm_table import SHAPE
from tests.algorithm_table import model as table_model

LOG3 = math.log(3.0)


# --- losses -----------------------------------------------------------------------------------------------------------
def test_kl_divergence_by_hand() -> None:
    """Teacher logits (log 3, 0): (3/4, 1/4). Student (0, 0): (1/2, 1/2).

    KL = 3/4 log(3/2) + 1/4 log(1/2) = 0.130812; its gradient in the student's logits is (1/2 - 3/4, 1/2 - 1/4).
    The other way round it would be 1/2 log(2/3) + 1/2 log 2 = 0.143841.
    """
    student = torch.zeros(1, 2, requires_grad=True)
    loss = kl_divergence(student, torch.tensor([[LOG3, 0.0]]))
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-0.25, 0.25]]))


def test_temperature_softens_and_is_scaled_back() -> None:
    """T = 2: teacher logits (log 9, 0) / 2 = (log 3, 0), so four times the number above; the mean over two alike."""
    student, teacher = torch.zeros(2, 2), torch.tensor([[2 * LOG3, 0.0]] * 2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_divergence(student, teacher, 2.0).item() == pytest.approx(expected)


def test_a_high_temperature_compares_centred_logits() -> None:
    """Differences (3, 0) centred: (1.5, -1.5); half of the mean square is 1.125. What is common to all classes is no
    difference."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[5.0, 2.0]])
    assert kl_divergence(student.double(), teacher.double(), 1e3).item() == pytest.approx(1.125, rel=1e-3)


def test_no_loss_to_oneself() -> None:
    logits = torch.randn(4, 5, generator=torch_generator(0, "logits"))
    for kind in ("kl", "l1", "mse"):
        assert logit_loss(logits, logits, kind, 3.0).item() == pytest.approx(0.0, abs=1e-6)  # type: ignore[arg-type]


def test_losses_on_logits_by_hand() -> None:
    """Differences 1, -3, 0, 0 of four logits: mean absolute 1, mean square 10/4."""
    student, teacher = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.0, 3.0], [2.0, 2.0]])
    assert logit_loss(student, teacher, "l1").item() == 1.0
    assert logit_loss(student, teacher, "mse").item() == 2.5
    assert logit_loss(student, teacher, "kl", 2.0).item() == kl_divergence(student, teacher, 2.0).item()


def test_soft_cross_entropy_is_kl_plus_the_entropy() -> None:
    """Target (3/4, 1/4), student (1/2, 1/2): log 2. The entropy of the target is 0.562335."""
    student, target = torch.zeros(1, 2), torch.tensor([[0.75, 0.25]])
    loss = soft_cross_entropy(student, target)
    assert loss.item() == pytest.approx(math.log(2.0))
    entropy = -(target * target.log()).sum()
    assert (loss - entropy).item() == pytest.approx(kl_divergence(student, target.log()).item())


# --- many models ------------------------------------------------------------------------------------------------------
def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def members(model: FlatModel, k: int) -> tuple[Tensor, Tensor]:
    """`k` models of this architecture and their running statistics, all different."""
    random = torch_generator(0, "members")
    parameters = torch.randn(k, model.layout.size, generator=random)
    return parameters, torch.rand(k, model.buffer_layout.size, generator=random) + 0.5


@pytest.fixture(params=["dense", "convolutions"])
def case(request: pytest.FixtureRequest) -> tuple[FlatModel, Tensor]:
    if request.param == "dense":
        return FlatModel(table_model(DataSpec(SHAPE, 3))), torch.randn(5, *SHAPE)
    return FlatModel(initialise(convolutions, 0)), torch.randn(5, 2, 4, 4)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_ensemble_answers_as_its_members_do(case: Any, batched: bool, training: bool) -> None:
    """Each with its own running statistics; and the model that lent its architecture is as it was, mode included."""
    model, x = case
    model.train(training)
    before = model.parameters.detach().clone(), model.buffers.clone()
    parameters, buffers = members(model, 4)
    logits = ensemble_logits(model, parameters, buffers, x, batched=batched)
    assert (model.training, all(part.training == training for part in model.module.modules())) == (training, True)
    assert torch.equal(model.parameters, before[0]) and torch.equal(model.buffers, before[1])
    model.eval()
    for k in range(4):
        model.load(parameters[k], buffers[k])
        torch.testing.assert_close(logits[k], model(x))


@pytest.mark.parametrize("batched", [False, True])
def test_an_ensemble_passes_gradients_to_its_inputs_and_members(case: Any, batched: bool) -> None:
    model, x = case
    parameters, buffers = members(model, 3)
    x = x.requires_grad_()
    parameters.requires_grad_()
    logits = ensemble_logits(model, parameters, buffers, x, batched=batched)
    inputs, models = torch.autograd.grad(logits.square().sum(), (x, parameters))
    model.eval()
    expected = torch.zeros_like(x)
    for k in range(3):
        model.load(parameters[k].detach(), buffers[k])
        model.zero_gradient()
        (own,) = torch.autograd.grad(model(x).square().sum(), x)
        expected += own
        model.zero_gradient()
        model(x.detach()).square().sum().backward()
        torch.testing.assert_close(models[k], model.gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inputs, expected, rtol=1e-4, atol=1e-4)


class Branching(nn.Module):
    """Looks at a number, which no batching of the call can do."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w if float(self.w.sum()) > 0 else x


def test_what_cannot_be_batched_is_looped_over() -> None:
    model = FlatModel(Branching())
    parameters = torch.tensor([[2.0, 3.0], [-2.0, -3.0]])
    logits = ensemble_logits(model, parameters, torch.empty(2, 0), torch.ones(1, 2), batched=True)
    assert logits.tolist() == [[[2.0, 3.0]], [[1.0, 1.0]]]
