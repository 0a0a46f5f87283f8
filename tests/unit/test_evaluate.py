"""Evaluation against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mpifed.learning.evaluate import Evaluation, evaluate
from mpifed.models import initialise
from mpifed.models.convolutional import fedgen_net
from mpifed.models.flat import FlatModel
from mpifed.types import DataSpec


class Echo(nn.Module):
    """The input is the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x


X = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [math.log(3.0), 0.0]])
Y = torch.tensor([0, 0, 1])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_by_hand(batch_size: int) -> None:
    """Softmax of (0, 0) is (1/2, 1/2), of (ln 3, 0) it is (3/4, 1/4); so the losses are ln 2, ln 4/3 and ln 4.

    Their mean is ln(2 * 4/3 * 4) / 3 = ln(32/3) / 3 however the samples are cut into batches; argmax is 0 for all three
    (the first of equal ones), so two are right.
    """
    result = evaluate(FlatModel(Echo()), X, Y, batch_size)
    assert (result.correct, result.examples, result.accuracy) == (2, 3, 2 / 3)
    assert result.loss == pytest.approx(math.log(32 / 3) / 3, rel=1e-6)


def test_loss_is_added_in_float64() -> None:
    """2^24 + 1 does not exist in float32: a loss of 2^24 and one of ln 2 would add up to 2^24 there.

    Logits (0, 2^24) with label 0 cost 2^24; the mean of the two is 2^23 + ln(2) / 2.
    """
    x = torch.tensor([[0.0, 2.0**24], [0.0, 0.0]])
    result = evaluate(FlatModel(Echo()), x, torch.tensor([0, 0]), 1)
    assert result.loss == pytest.approx(2**23 + math.log(2) / 2, rel=0, abs=1e-6)


def test_stored_samples_are_standardised_batch_by_batch() -> None:
    spec = DataSpec((1, 8, 8), 10, mean=(0.5,), std=(0.25,))
    model = FlatModel(initialise(lambda: fedgen_net(spec), 1))
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(256, (10, 1, 8, 8), generator=generator, dtype=torch.uint8)
    y = torch.randint(10, (10,), generator=generator)
    shapes = []

    def standardise(batch: Tensor) -> Tensor:
        shapes.append((batch.dtype, len(batch)))
        return spec.standardise(batch)

    stored = evaluate(model, x, y, 4, standardise=standardise)
    assert shapes == [(torch.uint8, 4), (torch.uint8, 4), (torch.uint8, 2)]
    assert stored == evaluate(model, spec.standardise(x), y, 4)


def test_nothing_of_the_model_changes_and_its_mode_is_restored() -> None:
    """In training mode batch normalisation would move its statistics and use those of the batch."""
    spec = DataSpec((1, 8, 8), 10)
    model = FlatModel(initialise(lambda: fedgen_net(spec), 1))
    x, y = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    before = [t.clone() for t in (model.parameters.detach(), model.gradient, model.buffers)]
    first = evaluate(model, x, y, 4)
    assert model.training
    assert all(
        torch.equal(a, b) for a, b in zip(before, (model.parameters, model.gradient, model.buffers), strict=True)
    )
    model.eval()
    assert evaluate(model, x, y, 4) == first
    assert not model.training


def test_interrupted_between_batches() -> None:
    """Called after each of the three batches; what it raises comes out, with the mode restored."""
    model, calls = FlatModel(Echo()), []
    evaluate(model, X, Y, 1, between=lambda: calls.append(model.training))
    assert calls == [False] * 3

    def stop() -> None:
        calls.append(True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, X, Y, 1, between=stop)
    assert len(calls) == 4 and model.training


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_still_give_an_accuracy(bad: float) -> None:
    """A NaN, or softmax of an infinity, makes the mean loss NaN; the two finite rows are one right and one wrong."""
    x = X.clone()
    x[0, 1] = bad  # argmax takes NaN and infinity for the largest: class 1, wrong
    result = evaluate(FlatModel(Echo()), x, Y, 2)
    assert math.isnan(result.loss)
    assert result.accuracy == 1 / 3


@pytest.mark.parametrize(("x", "y", "batch_size"), [(X[:0], Y[:0], 1), (X, Y[:2], 1), (X, Y, 0)])
def test_what_cannot_be_evaluated(x: Tensor, y: Tensor, batch_size: int) -> None:
    with pytest.raises(ValueError, match="cannot evaluate"):
        evaluate(FlatModel(Echo()), x, y, batch_size)


def test_evaluation_is_plain_numbers() -> None:
    result = evaluate(FlatModel(Echo()), X, Y, 2)
    assert [type(value) for value in vars(result).values()] == [float, float, int, int]
    assert result == Evaluation(result.accuracy, result.loss, 3, 2)
