"""Local training: which batches, which step size, and what a step does, against torch's own optimisers and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpifed.job import LocalTraining
from mpifed.learning.local import batches, displacement, full_gradient, learning_rate, local_training
from tests.toy import Prior, Quadratic, Slope, ToyEnv, close, context, output_is_loss, quadratic

ZERO = [0.0, 0.0, 0.0]


def numbered(examples: int, **local: Any) -> Any:
    """A client whose sample i is the number i."""
    return context(ToyEnv(Prior(ZERO), 1), torch.arange(float(examples)).view(-1, 1), **local)


def drawn(ctx: Any, **how: Any) -> list[list[int]]:
    return [[int(value) for value in x[:, 0]] for x, _ in batches(ctx, **how)]


# --- batches ----------------------------------------------------------------------------------------------------------
def test_an_epoch_is_a_permutation_cut_into_batches() -> None:
    parts = drawn(numbered(11, epochs=3, batch_size=4))
    assert [len(part) for part in parts] == [4, 4, 3] * 3
    passes = [[sample for part in parts[i : i + 3] for sample in part] for i in (0, 3, 6)]
    assert all(sorted(one) == list(range(11)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


@pytest.mark.parametrize(
    ("examples", "size", "expected"),
    [(9, 4, [4, 4]), (10, 4, [4, 4, 2]), (1, 4, [1]), (3, 1, [1, 1, 1]), (5, 100, [5]), (2, 2, [2])],
)
def test_a_last_batch_of_one_is_left_out(examples: int, size: int, expected: list[int]) -> None:
    """Unless it is the client's only sample, or batches of one are what the job asks for."""
    assert [len(part) for part in drawn(numbered(examples, epochs=1, batch_size=size))] == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_steps_take_as_many_passes_as_they_need(steps: int) -> None:
    """Nine samples in batches of four: two batches a pass, the ninth of every pass left out."""
    ctx = numbered(9, steps=steps, batch_size=4)
    parts = drawn(ctx)
    assert [len(part) for part in parts] == [4] * steps
    assert parts == drawn(numbered(9, epochs=4, batch_size=4))[:steps]
    assert local_training(ctx).steps == steps


def test_batches_depend_on_seed_round_client_and_purpose() -> None:
    def order(seed: int = 0, client: int = 0, round_: int = 1, purpose: str = "batches") -> list[list[int]]:
        env = ToyEnv(Prior(ZERO), 1, seed=seed)
        x = torch.arange(50.0).view(-1, 1)
        return drawn(context(env, x, client=client, round_=round_, epochs=1, batch_size=50), purpose=purpose)

    assert order() == order()
    others = [order(seed=1), order(client=1), order(round_=2), order(purpose="digest"), order()]
    assert len({tuple(one[0]) for one in others}) == 5


def test_labels_stay_with_their_samples() -> None:
    x = torch.arange(20.0).view(-1, 1)
    ctx = context(ToyEnv(Prior(ZERO), 1), x, torch.arange(20), epochs=2, batch_size=6)
    assert all(torch.equal(samples[:, 0].long(), labels) for samples, labels in batches(ctx))


# --- step size --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, [0.8, 0.8, 0.8, 0.8, 0.8]),
        ({"lr_schedule": "exponential", "lr_decay": 0.5}, [0.8, 0.4, 0.2, 0.1, 0.05]),
        ({"lr_schedule": "step", "lr_decay": 0.5, "lr_step": 2}, [0.8, 0.8, 0.4, 0.4, 0.2]),
        ({"lr_schedule": "cosine"}, [0.8, 0.8 * (2 + math.sqrt(2)) / 4, 0.4, 0.8 * (2 - math.sqrt(2)) / 4, 0.0]),
    ],
    ids=["constant", "exponential", "step", "cosine"],
)
def test_schedules(schedule: dict[str, Any], expected: list[float]) -> None:
    """Cosine over four rounds: (1 + cos(k pi/4))/2 for k = 0, 1, 2, 3; it would be 0 after the last (k = 4)."""
    local = LocalTraining(lr=0.8, **schedule)
    rates = [learning_rate(local, round_, 4) for round_ in range(1, 6)]
    assert rates == pytest.approx(expected, abs=1e-15)


def test_the_rounds_step_size_is_the_one_that_is_taken() -> None:
    """Gradient (1, 2, 3) everywhere, two steps; lr 0.5 halved every round, so 0.125 in round 3."""
    env = ToyEnv(Slope(ZERO), 1)
    ctx = context(env, torch.tensor([[1.0, 2, 3]]), round_=3, steps=2, lr=0.5, lr_schedule="exponential", lr_decay=0.5)
    trained = local_training(ctx, loss=output_is_loss)
    close(ctx.model.parameters.detach(), [-0.25, -0.5, -0.75])
    assert trained.displacement == 0.25 and trained.steps == 2


# --- what a step does -------------------------------------------------------------------------------------------------
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "clip": {"clip_norm": 0.05, "momentum": 0.5},
    "adam": {"optimizer": "adam", "weight_decay": 0.01},
}


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_the_same_as_torchs_optimisers_parameter_by_parameter(options: dict[str, Any]) -> None:
    """A network of several tensors trained as one vector, against the usual loop over its tensors."""

    def network() -> nn.Module:
        module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return module

    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(22, 4, generator=generator), torch.randint(3, (22,), generator=generator)
    ctx = context(ToyEnv(network(), 1), x, y, epochs=2, batch_size=5, lr=0.1, **options)
    trained = local_training(ctx)

    module = network()
    tensors = list(module.parameters())
    decay = options.get("weight_decay", 0.0)
    optimizer: torch.optim.Optimizer
    if options.get("optimizer") == "adam":
        optimizer = torch.optim.Adam(tensors, lr=0.1, weight_decay=decay)
    else:
        momentum, nesterov = options.get("momentum", 0.0), options.get("nesterov", False)
        optimizer = torch.optim.SGD(tensors, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    losses = []
    for samples, labels in batches(ctx):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(samples), labels)
        loss.backward()
        if "clip_norm" in options:
            nn.utils.clip_grad_norm_(tensors, options["clip_norm"])
        optimizer.step()
        losses.append(loss.item())
    expected = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    torch.testing.assert_close(ctx.model.parameters.detach(), expected, rtol=1e-5, atol=1e-6)
    assert trained.steps == len(losses) == 10
    assert trained.loss == ctx.logged["train_loss"] == pytest.approx(sum(losses) / 10, rel=1e-5)


def test_optimiser_state_is_new_every_round() -> None:
    """Gradient (1, 0, 0), momentum 0.5, two steps of 1: -1, then -1.5 more; from 0 again the same -2.5, not more."""
    env = ToyEnv(Slope(ZERO), 1)
    for round_ in (1, 2):
        ctx = context(env, torch.tensor([[1.0, 0, 0]]), round_=round_, steps=2, lr=1.0, momentum=0.5)
        ctx.model.load(torch.zeros(3))
        local_training(ctx, loss=output_is_loss)
        close(ctx.model.parameters.detach(), [-2.5, 0, 0])


def test_first_step_of_adam() -> None:
    """m/(1 - 0.9) = g and v/(1 - 0.999) = g^2, so the first step is lr g/(|g| + 1e-8): lr, whatever the gradient."""
    ctx = context(ToyEnv(Slope(ZERO), 1), torch.tensor([[1e-3, -50.0, 0]]), steps=1, lr=0.01, optimizer="adam")
    trained = local_training(ctx, loss=output_is_loss)
    close(ctx.model.parameters.detach(), [-0.01, 0.01, 0.0])
    assert math.isnan(trained.displacement)


def test_clipping_sees_the_correction_and_weight_decay_comes_after() -> None:
    """Gradient (3, 0, 0) corrected by (0, 4, 0) has norm 5, clipped to 1: (0.6, 0.8, 0). One step of lr 1 from

    w = (1, 1, 1) with weight decay 0.5 adds 0.5 w after clipping: w - (1.1, 1.3, 0.5) = (-0.1, -0.3, 0.5).
    """
    ctx = context(
        ToyEnv(Slope([1.0, 1, 1]), 1), torch.tensor([[3.0, 0, 0]]), steps=1, lr=1.0, clip_norm=1.0, weight_decay=0.5
    )

    def correction(parameters: Tensor, gradient: Tensor) -> None:
        assert parameters.tolist() == [1, 1, 1] and gradient.tolist() == [3, 0, 0]
        gradient.add_(torch.tensor([0.0, 4, 0]))

    local_training(ctx, correction, loss=output_is_loss)
    close(ctx.model.parameters.detach(), [-0.1, -0.3, 0.5])


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    ctx = context(ToyEnv(Slope(ZERO), 1), torch.tensor([[float("inf"), 0, 0]]), steps=1)
    with pytest.raises(FloatingPointError, match="loss is not finite"):
        local_training(ctx, loss=output_is_loss)


def test_bfloat16_trains_float32_parameters() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    seen = []
    module.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    ctx = context(ToyEnv(module, 1), x, epochs=1, batch_size=4, precision="bfloat16")
    local_training(ctx)
    assert seen == [torch.bfloat16] * 2 and ctx.model.parameters.dtype == torch.float32


def test_dropout_depends_on_round_and_client_not_on_what_ran_before() -> None:
    module = nn.Sequential(nn.Linear(2, 50), nn.Dropout(), nn.Linear(50, 3))
    env = ToyEnv(module, 2)
    x = torch.ones(4, 2)

    def trained(noise: int, client: int) -> Tensor:
        torch.manual_seed(noise)
        ctx = context(env, x, client=client, epochs=1, batch_size=4)
        ctx.model.load(*env.initial())
        gradient = full_gradient(ctx)
        local_training(ctx)
        return torch.cat([gradient, ctx.model.parameters.detach()])

    assert torch.equal(trained(1, 0), trained(2, 0))
    assert not torch.equal(trained(1, 0), trained(1, 1))


# --- displacement -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.9, True)])
def test_displacement_is_what_a_unit_gradient_moves(momentum: float, nesterov: bool, steps: int) -> None:
    """Brute force: torch's SGD on the loss w. And FedNova's closed form, without Nesterov."""
    local = LocalTraining(lr=0.3, steps=steps, momentum=momentum, nesterov=nesterov)
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.3, momentum=momentum, nesterov=nesterov)
    for _ in range(steps):
        w.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
    moved = displacement(local, 0.3, steps)
    assert moved == pytest.approx(-w.item(), rel=1e-12)
    if not nesterov:
        closed = (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
        assert moved == pytest.approx(0.3 * closed, rel=1e-12)


# --- the full gradient ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 8])
def test_full_gradient_is_the_mean_over_all_samples(batch_size: int) -> None:
    """Gradients a (w - e) at w = 1: 1 * 1, 2 * -1, 3 * 2, 4 * 0, 5 * -2; their mean (1 - 2 + 6 + 0 - 10)/5 is -1."""
    pairs = [(1.0, 0.0), (2.0, 2.0), (3.0, -1.0), (4.0, 1.0), (5.0, 3.0)]
    x = torch.cat([quadratic([a], [e]) for a, e in pairs])
    ctx = context(ToyEnv(Quadratic([1.0]), 1), x, batch_size=batch_size)
    close(full_gradient(ctx, loss=output_is_loss), [-1.0])


@pytest.mark.parametrize("examples", [2, 3, 5, 9])
def test_full_gradient_with_batch_normalisation(examples: int) -> None:
    """A last batch of one sample could not be normalised: it joins the one before."""
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    x = torch.randn(examples, 2, generator=torch.Generator().manual_seed(0))
    assert full_gradient(context(ToyEnv(module, 1), x, batch_size=4)).isfinite().all()
