"""The pieces of data-free systems by hand: diversity, weights of clients by label, priors, draws."""

from __future__ import annotations

import math

import pytest
import torch

from mpifed.learning.generation import diversity_loss, draw_noise, label_prior, label_weights, sample_labels
from mpifed.rng import torch_generator
from tests.toy import close


# --- diversity --------------------------------------------------------------------------------------------------------
def test_diversity_by_hand() -> None:
    """Two samples of two numbers, noise of one.

    Samples (0, 0) and (1, 3): mean absolute difference 2, norm sqrt(10). Noise 0 and 2: mean square 4, norm 2. Of four
    pairs two are a sample with itself: means over the pairs 2 * 8 / 4 = 4 and 2 * 2 sqrt(10) / 4 = sqrt(10).
    """
    noise, samples = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert diversity_loss(noise, samples).item() == pytest.approx(math.exp(-4.0))
    assert diversity_loss(noise, samples, "norm").item() == pytest.approx(math.exp(-math.sqrt(10.0)))


@pytest.mark.parametrize("distances", ["mean", "norm"])
def test_equal_samples_are_not_diverse(distances: str) -> None:
    """The loss is 1, and its gradient a number: norms have none at zero, where every sample is from itself."""
    samples = torch.ones(3, 2, 2, requires_grad=True)
    loss = diversity_loss(torch.arange(3.0)[:, None], samples, distances)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == 1.0 and samples.grad is not None and bool(samples.grad.isfinite().all())


def test_descending_the_loss_drives_samples_apart_and_shape_does_not_matter() -> None:
    noise = torch.tensor([[0.0], [1.0]])
    samples = torch.tensor([[[0.0, 0.1]], [[0.2, 0.3]]], requires_grad=True)
    loss = diversity_loss(noise, samples)
    (gradient,) = torch.autograd.grad(loss, samples)
    assert bool((gradient[0] > 0).all()) and bool((gradient[1] < 0).all())
    assert diversity_loss(noise, samples.flatten(1)).item() == loss.item()


# --- labels -----------------------------------------------------------------------------------------------------------
COUNTS = torch.tensor([[3, 0, 0], [1, 5, 0]])


def test_weights_by_label_sum_to_one_and_are_zero_without_samples() -> None:
    """Label 0: 3 and 1 of 4. Label 1: only client 1. Label 2: nobody."""
    close(label_weights(COUNTS).flatten(), [0.75, 0.0, 0.0, 0.25, 1.0, 0.0])


def test_smoothed_weights_by_label() -> None:
    """One sample more of everything (FedGen's code): 4 and 2 of 6, 1 and 6 of 7, and halves of what nobody has."""
    close(label_weights(COUNTS, 1.0).flatten(), [4 / 6, 1 / 7, 0.5, 2 / 6, 6 / 7, 0.5])


def test_the_prior_is_the_share_of_all_samples() -> None:
    """4, 5 and 0 of 9."""
    close(label_prior(COUNTS), [4 / 9, 5 / 9, 0.0])
    close(label_prior(torch.zeros(2, 3)), [0.0, 0.0, 0.0])


def test_labels_follow_the_prior() -> None:
    """10,000 draws of p = 0.4: standard deviation 49."""
    labels = sample_labels(torch.tensor([2.0, 0.0, 3.0]), 10_000, torch_generator(0, "labels"))
    assert labels.dtype == torch.int64
    counts = torch.bincount(labels, minlength=3)
    assert int(counts[1]) == 0 and abs(int(counts[0]) - 4000) < 250
    assert torch.equal(labels, sample_labels(torch.tensor([2.0, 0.0, 3.0]), 10_000, torch_generator(0, "labels")))


def test_noise() -> None:
    """Means 0 and 1/2, deviations 1 and 1/sqrt(12), of 20,000 numbers each."""
    normal = draw_noise("normal", 2000, 10, torch_generator(0, "noise"))
    uniform = draw_noise("uniform", 2000, 10, torch_generator(0, "noise"))
    assert normal.shape == uniform.shape == (2000, 10)
    assert abs(float(normal.mean())) < 0.03 and abs(float(normal.std()) - 1) < 0.03
    assert abs(float(uniform.mean()) - 0.5) < 0.01 and abs(float(uniform.std()) - 12**-0.5) < 0.01
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
