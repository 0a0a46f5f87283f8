"""FedKD's losses and their gradients on one sample of two classes, with every number worked out by hand.

The mentor says (3/4, 1/4), logits a = (ln 3, 0); the mentee (1/2, 1/2), logits b = (0, 0); the label is class 0.

    T_t = -ln 3/4 = 0.2876821      T_s = ln 2 = 0.6931472      D = T_t + T_s = 0.9808293
    KL(y_s || y_t) = 1/2 ln (1/2 : 3/4) + 1/2 ln (1/2 : 1/4) = 1/2 ln 4/3 = 0.1438410        the mentor's K_t
    KL(y_t || y_s) = 3/4 ln (3/4 : 1/2) + 1/4 ln (1/4 : 1/2) = 3/4 ln 3/2 - 1/4 ln 2 = 0.1308120        the mentee's K_s

Hidden states: H_t = (1, 2) of width 2, H_s = (3) of width 1, W = (1, 0)^T, so W H_s = (3, 0), H_t - W H_s = (-2, 2) and
MSE = (4 + 4)/2 = 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpifed.algorithms.fedkd import FedKD
from mpifed.learning.mutual import (
    Losses,
    Mutual,
    attention_distance,
    hidden_distance,
    layer_pairs,
    mutual_losses,
    mutual_training,
)
from mpifed.models.classifier import Trace
from mpifed.models.flat import FlatModel
from tests.toy import ToyEnv, context

pytestmark = pytest.mark.golden

TASK = (-log(3 / 4), log(2))
D = sum(TASK)
KL_MENTOR, KL_MENTEE = log(4 / 3) / 2, 0.75 * log(1.5) - 0.25 * log(2)
PAPER = replace(FedKD().mutual, epsilon=0.0)
OFFICIAL = FedKD(variant="official", projection=True).mutual


def sample(mutual: Mutual) -> tuple[list[Tensor], Losses]:
    """The logits a and b, H_t, H_s and W, all differentiable; and the losses."""
    values = [[[log(3), 0.0]], [[0.0, 0.0]], [[1.0, 2.0]], [[3.0]], [[1.0], [0.0]]]
    a, b, h_t, h_s, w = (torch.tensor(value, requires_grad=True) for value in values)
    return [a, b, h_t, h_s, w], mutual_losses(mutual, Trace(a, (h_t,)), Trace(b, (h_s,)), torch.tensor([0]), [w])


def close(actual: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected), rtol=0, atol=2e-6)


def number(value: Tensor) -> float:
    return float(value.detach())


# --- values -----------------------------------------------------------------------------------------------------------
def test_losses_of_the_paper() -> None:
    """L = T + K/D + 4/D: 0.2876821 + 4.1438410/0.9808293 = 4.5125167, and 0.6931472 + 4.1308120/0.9808293 = 4.9046981.

    The other direction of the divergence would exchange 0.1438410 and 0.1308120.
    """
    _, losses = sample(PAPER)
    close(torch.stack([losses.mentor_task, losses.mentee_task, losses.divergence]), [*TASK, KL_MENTOR])
    assert number(losses.distance) == pytest.approx(4)
    assert number(losses.mentor) == pytest.approx(TASK[0] + (KL_MENTOR + 4) / D, abs=2e-6) == pytest.approx(4.5125167)
    assert number(losses.mentee) == pytest.approx(TASK[1] + (KL_MENTEE + 4) / D, abs=2e-6) == pytest.approx(4.9046981)


def test_the_code_divides_the_divergence_by_the_classes() -> None:
    """K/2 in place of K."""
    _, losses = sample(OFFICIAL)
    assert number(losses.mentor) == pytest.approx(TASK[0] + (KL_MENTOR / 2 + 4) / D, abs=2e-6)
    assert number(losses.mentee) == pytest.approx(TASK[1] + (KL_MENTEE / 2 + 4) / D, abs=2e-6)


def test_d_is_one_number_a_batch() -> None:
    """A second sample of the same logits and the label 1: T_t = (-ln 3/4 - ln 1/4)/2, T_s = ln 2, K as before.

    With a D of each sample, the batch's K/D would be the mean of K/D_1 and K/D_2.
    """
    a, b = torch.tensor([[log(3), 0.0]] * 2), torch.zeros(2, 2)
    mutual = replace(PAPER, hidden=0.0)
    losses = mutual_losses(mutual, Trace(a, ()), Trace(b, ()), torch.tensor([0, 1]))
    tasks = (-log(3 / 4) - log(1 / 4)) / 2, log(2)
    assert number(losses.mentor) == pytest.approx(tasks[0] + KL_MENTOR / sum(tasks), abs=2e-6)


def test_terms_that_are_left_out() -> None:
    """Without D everything is divided by 1; without distillation nothing is left of it; epsilon is added to D."""
    plain = sample(replace(PAPER, adaptive=False, distillation=0.5))[1]
    assert number(plain.mentor) == pytest.approx(TASK[0] + 0.5 * KL_MENTOR + 4, abs=2e-6)
    alone = sample(replace(PAPER, distillation=0.0, hidden=0.0))[1]
    assert (number(alone.mentor), number(alone.mentee)) == pytest.approx(TASK, abs=2e-6)
    guarded = sample(replace(PAPER, epsilon=1.0))[1]
    assert number(guarded.mentor) == pytest.approx(TASK[0] + (KL_MENTOR + 4) / (D + 1), abs=2e-6)


def test_fml_is_twice_this_without_d_and_hidden_states() -> None:
    """FML (arXiv 2006.16765) at alpha = beta = 1/2: L_p = CE/2 + KL(meme || p)/2, L_meme = CE/2 + KL(p || meme)/2."""
    _, losses = sample(replace(PAPER, adaptive=False, hidden=0.0))
    assert number(losses.mentor) / 2 == pytest.approx(TASK[0] / 2 + KL_MENTOR / 2, abs=2e-6)
    assert number(losses.mentee) / 2 == pytest.approx(TASK[1] / 2 + KL_MENTEE / 2, abs=2e-6)


# --- gradients --------------------------------------------------------------------------------------------------------
def test_gradients_of_the_paper() -> None:
    """Each model by its own loss, D a constant; p = y_t, q = y_s, y = (1, 0).

    a: (p - y) + (p - q)/D = (-1/4, 1/4) + (1/4, -1/4)/D. b: (q - y) + (q - p)/D = (-1/2, 1/2) + (-1/4, 1/4)/D.
    H_t: 2 (H_t - W H_s)/2 / D = (-2, 2)/D. H_s: -W^T (H_t - W H_s)/D = 2/D.
    W: -(H_t - W H_s) H_s^T / D = (6, -6)/D.
    """
    (a, b, h_t, h_s, w), losses = sample(PAPER)
    losses.mentor.backward(inputs=[a, h_t], retain_graph=True)
    losses.mentee.backward(inputs=[b, h_s, w])
    for tensor, expected in (
        (a, [-0.25 + 0.25 / D, 0.25 - 0.25 / D]),
        (b, [-0.5 - 0.25 / D, 0.5 + 0.25 / D]),
        (h_t, [-2 / D, 2 / D]),
        (h_s, [2 / D]),
        (w, [6 / D, -6 / D]),
    ):
        assert tensor.grad is not None
        close(tensor.grad, expected)


def test_gradients_of_the_code() -> None:
    """One backward of L_t + L_s with nothing detached, K/2 as above, without hidden states:

    S = T_t + T_s + (K_t + K_s)/(2 D), so dS/da = (p - y) (1 - (K_t + K_s)/(2 D^2)) + (dK_t/da + dK_s/da)/(2 D), where
    dK_t/da = p - q = (1/4, -1/4) and dK_s/da = p (ln p/q - K_s) = (0.2059899, -0.2059899): the other's loss pulls at
    the mentor, and its task counts less where the models disagree.
    """
    (a, _, _, _, _), losses = sample(replace(OFFICIAL, hidden=0.0))
    (losses.mentor + losses.mentee).backward()
    pull = 0.75 * (log(1.5) - KL_MENTEE)
    assert pull == pytest.approx(0.2059899, abs=1e-7)
    expected = -0.25 * (1 - (KL_MENTOR + KL_MENTEE) / (2 * D**2)) + (0.25 + pull) / (2 * D)
    assert a.grad is not None
    close(a.grad, [expected, -expected])


def test_the_hidden_loss_counts_twice_in_the_codes_sum() -> None:
    (_, _, h_t, h_s, w), losses = sample(replace(OFFICIAL, detach_denominator=True))
    (losses.mentor + losses.mentee).backward()
    assert h_t.grad is not None and h_s.grad is not None and w.grad is not None
    close(
        torch.cat([h_t.grad.flatten(), h_s.grad.flatten(), w.grad.flatten()]), [-4 / D, 4 / D, 4 / D, 12 / D, -12 / D]
    )


def test_detached_the_sum_is_the_paper_but_for_the_hidden_loss() -> None:
    """With targets and D detached nothing of the other's loss is left in a model's logits."""
    detached = replace(OFFICIAL, kl="batchmean", detach_targets=True, detach_denominator=True)
    (a, b, _, _, _), losses = sample(detached)
    (losses.mentor + losses.mentee).backward()
    assert a.grad is not None and b.grad is not None
    close(a.grad, [-0.25 + 0.25 / D, 0.25 - 0.25 / D])
    close(b.grad, [-0.5 - 0.25 / D, 0.5 + 0.25 / D])


class Told(nn.Module):
    """A model that says the same of every sample: its parameters are the logits, and the one hidden state."""

    def __init__(self, logits: Sequence[float], hidden: Sequence[float]) -> None:
        super().__init__()
        self.logits, self.hidden = nn.Parameter(torch.tensor(logits)), nn.Parameter(torch.tensor(hidden))

    def trace(self, x: Tensor) -> Trace:
        return Trace(self.logits.expand(len(x), -1), (self.hidden.expand(len(x), -1),))


class TwoModels(ToyEnv):
    """A client's own model beside the shared one."""

    def __init__(self, own: nn.Module, shared: nn.Module) -> None:
        super().__init__(shared, clients=1)
        self._own = FlatModel(own)

    def model(self, client: int | None = None) -> FlatModel:
        return self._model if client is None else self._own


@pytest.mark.parametrize(("gradients", "times"), [("own", 1), ("sum", 2)])
def test_a_training_step_follows_these_gradients(gradients: Any, times: int) -> None:
    """One step of lr 0.5 on the sample above moves everything by -0.5 times the gradients of the paper, mentor by
    mentor's loss and mentee and W by the mentee's; by those of the sum, which is detached here, hidden states and W
    go twice as far."""
    env: Any = TwoModels(Told([log(3), 0.0], [1.0, 2.0]), Told([0.0, 0.0], [3.0]))
    ctx = context(env, torch.zeros(1, 1), torch.tensor([0]), lr=0.5, steps=1)
    projections, _ = mutual_training(ctx, replace(PAPER, gradients=gradients), [torch.tensor([[1.0], [0.0]])])
    r = times / D
    mentor = [-0.25 + 0.25 / D, 0.25 - 0.25 / D, -2 * r, 2 * r]
    mentee = [-0.5 - 0.25 / D, 0.5 + 0.25 / D, 2 * r]
    for values, start, gradient in (
        (ctx.model.parameters, [log(3), 0.0, 1.0, 2.0], mentor),
        (env.model().parameters, [0.0, 0.0, 3.0], mentee),
        (projections[0], [1.0, 0.0], [6 * r, -6 * r]),
    ):
        close(values.detach(), [at - 0.5 * slope for at, slope in zip(start, gradient, strict=True)])


@pytest.mark.parametrize("mutual", [PAPER, OFFICIAL], ids=["paper", "official"])
def test_a_probability_that_underflows_has_a_finite_gradient(mutual: Mutual) -> None:
    """e^-200 is 0 in float32, and the usual `kl_div` of probabilities then gives NaN to undetached targets."""
    a = torch.tensor([[200.0, 0.0]], requires_grad=True)
    b = torch.tensor([[0.0, 200.0]], requires_grad=True)
    losses = mutual_losses(replace(mutual, hidden=0.0), Trace(a, ()), Trace(b, ()), torch.tensor([0]))
    (losses.mentor + losses.mentee).backward()
    for logits in (a, b):
        assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())


# --- layers, tokens, heads --------------------------------------------------------------------------------------------
def test_layers_of_the_paper() -> None:
    """Mentee layers 4, 3, 2, 1 and mentor layers 12, 9, 6, 3 (from 1); two layers: 12 and 6; others in proportion."""
    assert layer_pairs(12, 4) == [(2, 0), (5, 1), (8, 2), (11, 3)]
    assert layer_pairs(12, 2) == [(5, 0), (11, 1)]
    assert layer_pairs(5, 2) == [(2, 0), (4, 1)]  # ceil(5/2) = 3
    assert layer_pairs(2, 3) == [(0, 0), (1, 1), (1, 2)]
    assert layer_pairs(1, 1) == [(0, 0)]


def test_hidden_states_at_padding_do_not_count() -> None:
    """Two tokens of width 1 and a padded one: differences 1, 2 and 100, so (1 + 4)/2; summed over two layers, 5."""
    state, zero = torch.tensor([[[1.0], [2.0], [100.0]]]), torch.zeros(1, 3, 1)
    mask = torch.tensor([[True, True, False]])
    logits = torch.zeros(1, 2)
    distance = hidden_distance(Trace(logits, (state,) * 4, mask=mask), Trace(logits, (zero,) * 2, mask=mask), ())
    assert float(distance) == 5


def test_attention_maps() -> None:
    """Rows (1, 0) and (0, 1) against rows (1/2, 1/2): every square is 1/4, and so is the mean, in every layer.

    With one real token only its row and column count, where 1 - 1/2 = 1/2: again 1/4. Two heads, one of which attends
    to itself and one to the other token, have the mean (1/2, 1/2): no distance from a model of one such head.
    """
    logits, even = torch.zeros(1, 2), torch.full((1, 1, 2, 2), 0.5)
    own, crossed = torch.eye(2).view(1, 1, 2, 2), torch.eye(2).flip(0).view(1, 1, 2, 2)

    def distance(mentor: Tensor, mentee: Tensor, *mask: bool) -> float:
        masks = torch.tensor([mask])
        return float(attention_distance(Trace(logits, (), (mentor,), masks), Trace(logits, (), (mentee,), masks)))

    assert distance(own, even, True, True) == 0.25
    assert distance(own, even, True, False) == 0.25
    assert distance(torch.cat([own, crossed], dim=1), even, True, True) == 0.0
    assert distance(torch.cat([own, own], dim=1), torch.cat([even, own], dim=1), True, True) == 0.125
