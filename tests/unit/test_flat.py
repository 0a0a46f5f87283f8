"""A flat model trains exactly as the module it wraps, and its views never come loose."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mpifed.errors import BadInput
from mpifed.models import initialise
from mpifed.models.convolutional import cnn, fedgen_net
from mpifed.models.dense import linear, mlp
from mpifed.models.flat import FlatModel
from mpifed.types import DataSpec

SPEC = DataSpec(input_shape=(1, 8, 8), classes=3)

FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp(SPEC, hidden=(7, 5)),
    "cnn": lambda: cnn(SPEC, hidden=9),
    "batch normalisation": lambda: fedgen_net(SPEC),
}
OPTIMISERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01),
}


def batches(number: int = 4, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(number)
    ]


def step(model: FlatModel, x: Tensor, y: Tensor) -> None:
    model.zero_gradient()
    functional.cross_entropy(model(x), y).backward()


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0), *(tensor.detach().reshape(-1) for tensor in tensors)])


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_trains_bit_for_bit_as_the_module_does(factory: str, optimiser: str) -> None:
    plain = initialise(FACTORIES[factory], 1).train()
    model = FlatModel(copy.deepcopy(plain))
    plain_optimiser = OPTIMISERS[optimiser](list(plain.parameters()))
    flat_optimiser = OPTIMISERS[optimiser]([model.parameters])
    start = model.parameters.detach().clone()
    for x, y in batches():
        plain_optimiser.zero_grad()
        functional.cross_entropy(plain(x), y).backward()
        step(model, x, y)
        assert torch.equal(model.gradient, flat([p.grad for p in plain.parameters() if p.grad is not None]))
        plain_optimiser.step()
        flat_optimiser.step()
        assert torch.equal(model.parameters, flat(list(plain.parameters())))
        assert torch.equal(model.buffers, flat([b for b in plain.buffers() if b.is_floating_point()]))
    assert not torch.equal(model.parameters, start)
    x = batches()[0][0]
    model.eval()
    assert torch.equal(model(x), plain.eval()(x))


@pytest.mark.parametrize("factory", FACTORIES)
def test_training_never_moves_the_memory(factory: str) -> None:
    module = FACTORIES[factory]()
    model = FlatModel(module)
    optimiser = torch.optim.SGD([model.parameters], lr=0.1, momentum=0.9)

    def addresses() -> list[int]:
        parameters = [(p.data_ptr(), p.grad.data_ptr() if p.grad is not None else 0) for p in module.parameters()]
        return [address for pair in parameters for address in pair] + [b.data_ptr() for b in module.buffers()]

    before = addresses()
    for x, y in batches():
        step(model, x, y)
        optimiser.step()
    assert addresses() == before
    for base, layout, named in (
        (model.parameters, model.layout, dict(module.named_parameters())),
        (model.buffers, model.buffer_layout, dict(module.named_buffers())),
    ):
        for name, offset in zip(layout.names, layout.offsets, strict=True):
            assert named[name].data_ptr() == base.data_ptr() + 4 * offset
    assert module.get_parameter(model.layout.names[0]).grad is not None


def test_layout_is_the_modules_order() -> None:
    model = FlatModel(fedgen_net(SPEC, channels=(2,), latent=4))
    assert model.layout.names == (
        "body.conv1.weight",
        "body.conv1.bias",
        "body.norm1.weight",
        "body.norm1.bias",
        "body.latent.weight",
        "body.latent.bias",
        "head.weight",
        "head.bias",
    )
    assert model.layout.shapes == ((2, 1, 3, 3), (2,), (2,), (2,), (4, 32), (4,), (3, 4), (3,))
    assert model.buffer_layout.names == ("body.norm1.running_mean", "body.norm1.running_var")
    assert model.buffers.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert model.parameters.shape == model.gradient.shape == (model.layout.size,)


def test_load_copies_and_the_next_forward_uses_it() -> None:
    model, other = FlatModel(initialise(FACTORIES["cnn"], 1)), FlatModel(initialise(FACTORIES["cnn"], 2))
    x = batches()[0][0]
    wanted = other(x)
    assert not torch.equal(model(x), wanted)
    values = other.parameters.detach().clone()
    model.load(values)
    assert torch.equal(model(x), wanted)
    values.zero_()  # the model keeps what it was given
    assert torch.equal(model(x), wanted)
    model.load(other.parameters)  # a leaf that requires a gradient may be given too
    assert model.parameters.is_leaf and model.parameters.requires_grad


def test_load_of_buffers_reaches_batch_normalisation() -> None:
    model = FlatModel(fedgen_net(SPEC, channels=(2,)))
    model.eval()
    x = batches()[0][0]
    before = model(x)
    model.load(model.parameters)
    assert torch.equal(model(x), before)
    model.load(model.parameters, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert model.module.get_buffer("body.norm1.running_var").tolist() == [3.0, 4.0]
    assert not torch.equal(model(x), before)


def test_load_refuses_wrong_sizes_and_changes_nothing() -> None:
    model = FlatModel(fedgen_net(SPEC, channels=(2,)))
    before = model.parameters.detach().clone()
    zeros = torch.zeros_like(before)
    for parameters, buffers in ((zeros[1:], None), (zeros[None], None), (zeros, torch.zeros(5))):
        with pytest.raises(ValueError, match="of shape"):
            model.load(parameters, buffers)
    assert torch.equal(model.parameters, before)


def test_zero_gradient_takes_back_gradients_that_were_set_to_none() -> None:
    model = FlatModel(FACTORIES["cnn"]())
    x, y = batches()[0]
    step(model, x, y)
    wanted = model.gradient.clone()
    model.module.zero_grad(set_to_none=True)
    torch.optim.SGD([model.parameters], lr=0.1).zero_grad(set_to_none=True)
    assert model.parameters.grad is None
    step(model, x, y)
    assert torch.equal(model.gradient, wanted)
    assert model.parameters.grad is model.gradient
    model.zero_gradient()
    assert model.gradient.abs().max() == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.module.parameters())


@pytest.mark.parametrize("factory", FACTORIES)
def test_dropped_gradients_are_the_same_wherever_they_are(factory: str) -> None:
    model, x, y = FlatModel(FACTORIES[factory]()), *batches()[0]
    step(model, x, y)
    wanted = model.gradient.clone()
    model.gradient.fill_(torch.nan)  # must not be added to
    model.drop_gradient()
    functional.cross_entropy(model(x), y).backward()
    assert torch.equal(flat(model.gradients()), wanted)
    model.gather_gradient()
    assert torch.equal(model.gradient, wanted)
    model.gradient.mul_(2)  # a correction
    assert torch.equal(flat(model.gradients()), 2 * wanted)
    step(model, x, y)
    assert torch.equal(model.gradient, wanted)


def test_a_part_without_a_gradient_has_a_zero_one() -> None:
    """The loss 5 w_1 leaves w_2 out: the gradient is (5, 0), whatever it was before."""
    module = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    model = FlatModel(module)
    model.gradient.fill_(torch.nan)
    model.drop_gradient()
    module[0](torch.tensor([[5.0]])).sum().backward()
    assert [part.item() for part in model.gradients()] == [5.0, 0.0]
    model.gather_gradient()
    assert model.gradient.tolist() == [5.0, 0.0]


def test_gradients_of_two_losses_add_up_and_can_be_corrected() -> None:
    """With one weight w = 2 and the loss 3w + 4w the gradient is 7; corrected by +1 and stepped at 0.5, w = 2 - 4."""
    module = nn.Linear(1, 1, bias=False)
    model = FlatModel(module)
    model.load(torch.tensor([2.0]))
    model(torch.tensor([[3.0]])).sum().backward()
    model(torch.tensor([[4.0]])).sum().backward()
    assert model.gradient.tolist() == [7.0]
    model.gradient += 1
    torch.optim.SGD([model.parameters], lr=0.5).step()
    assert module.weight.item() == -2.0


class Tied(nn.Module):
    """y = w (w x): the same 1x1 weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_tied_parameters_are_one() -> None:
    """y = w^2 x, so dy/dw = 2 w x = 12 at w = 3, x = 2; a step of 0.25 gives w = 0 and y = 0."""
    model = FlatModel(Tied())
    assert model.layout.names == ("first.weight",)
    model.load(torch.tensor([3.0]))
    y = model(torch.tensor([[2.0]]))
    assert y.item() == 18.0
    y.sum().backward()
    assert model.gradient.tolist() == [12.0]
    torch.optim.SGD([model.parameters], lr=0.25).step()
    assert model(torch.tensor([[2.0]])).item() == 0.0


def test_frozen_parameters_are_buffers_and_keep_their_values() -> None:
    module = mlp(SPEC, hidden=(4,))
    module.get_parameter("body.linear1.weight").requires_grad_(False)
    frozen = module.get_parameter("body.linear1.weight").detach().clone()
    model = FlatModel(module)
    assert model.layout.names == ("body.linear1.bias", "head.weight", "head.bias")
    assert model.buffer_layout.names == ("body.linear1.weight",)
    optimiser = torch.optim.SGD([model.parameters], lr=0.1, weight_decay=0.1)
    for x, y in batches():
        step(model, x, y)
        optimiser.step()
    assert torch.equal(model.buffers.view(4, 64), frozen)
    assert torch.equal(module.get_parameter("body.linear1.weight"), frozen)
    model.load(model.parameters, torch.zeros(256))
    assert module.get_parameter("body.linear1.weight").abs().max() == 0


def test_integer_and_non_persistent_buffers_stay_in_the_module() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.register_buffer("constant", torch.ones(3), persistent=False)
    module.register_buffer("table", torch.ones(3))
    model = FlatModel(module)
    assert model.buffer_layout.names == ("table", "1.running_mean", "1.running_var")
    model(torch.randn(4, 2))
    assert module.get_buffer("1.num_batches_tracked").item() == 1


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "complex64"])
def test_only_float32(dtype: str) -> None:
    wanted = getattr(torch, dtype)
    odd = linear(SPEC)
    odd.get_submodule("head").register_parameter("bias", nn.Parameter(torch.zeros(3, dtype=wanted)))
    with pytest.raises(BadInput, match=rf"'head\.bias'.*{dtype}"):
        FlatModel(odd)
    odd = linear(SPEC)
    odd.register_buffer("scale", torch.ones(1, dtype=wanted))
    with pytest.raises(BadInput, match=rf"'scale'.*{dtype}"):
        FlatModel(odd)


def test_a_module_without_parameters_is_refused() -> None:
    with pytest.raises(BadInput, match="no trainable parameter"):
        FlatModel(nn.Sequential(nn.ReLU()))


def test_mode() -> None:
    dropout = nn.Dropout()
    model = FlatModel(nn.Sequential(nn.Linear(1, 1), dropout))
    assert model.training and dropout.training
    model.eval()
    assert not model.training and not dropout.training
    model.train()
    assert model.training and dropout.training


def test_values_survive_being_wrapped_whatever_their_strides() -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weight = module.weight.detach().clone()
    model = FlatModel(module)
    assert torch.equal(module.weight, weight) and module.weight.is_contiguous()
    assert torch.equal(model.parameters[: weight.numel()], weight.reshape(-1))


def test_what_a_client_counted_does_not_reach_the_next() -> None:
    """Integers in the module begin anew with every load, so results do not depend on who shares a rank."""
    model = FlatModel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=None)))
    counter = model.module[1].num_batches_tracked
    parameters = model.parameters.detach().clone()
    model.load(parameters)
    model.train()
    model(torch.randn(4, 2))
    assert counter.item() == 1
    model.load(parameters)
    assert counter.item() == 0
