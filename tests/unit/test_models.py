"""Sizes of the models against published numbers, their shapes, and their dependence on the seed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpifed.component import bind, resolve
from mpifed.errors import BadInput
from mpifed.models import MODELS, build, initialise
from mpifed.models.classifier import split
from mpifed.models.convolutional import cnn, fd_cnn, feddyn_cnn, fedgen_net
from mpifed.models.dense import linear, mlp, two_nn
from mpifed.models.fedmd import TABLE_1, TABLE_2, SameAveragePool, fedmd_cnn
from mpifed.models.flat import FlatModel
from mpifed.models.resnet import resnet18
from mpifed.types import DataSpec

MNIST = DataSpec((1, 28, 28), 10)
LETTERS = DataSpec((1, 28, 28), 26)
CIFAR10 = DataSpec((3, 32, 32), 10)
CIFAR100 = DataSpec((3, 32, 32), 100)
DIGITS = DataSpec((1, 8, 8), 10)
CELEBA = DataSpec((3, 84, 84), 2)
TREC = DataSpec((32,), 6, vocabulary=3_513)
DATA = {"MNIST": MNIST, "CIFAR-10": CIFAR10, "digits": DIGITS}

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def factory_of(name: str) -> Callable[..., nn.Module]:
    return resolve(MODELS, name, "model.name")


def spec_for(name: str) -> DataSpec:
    """A data set that the model takes."""
    return TREC if name == "transformer" else CIFAR10


def sizes(factory: Callable[..., nn.Module], spec: DataSpec, **keys: Any) -> tuple[int, int]:
    model = FlatModel(factory(spec, **keys))
    return model.layout.size, model.buffer_layout.size


@pytest.mark.parametrize(
    ("factory", "spec", "keys", "expected"),
    [
        # 784*10 + 10
        (linear, MNIST, {}, (7_850, 0)),
        # 784*200 + 200 + 200*200 + 200 + 200*10 + 10: the number in McMahan et al.
        (two_nn, MNIST, {}, (199_210, 0)),
        # the 784-100-100-10 of FedDyn's EMNIST runs: 78,500 + 10,100 + 1,010
        (two_nn, MNIST, {"hidden": 100}, (89_610, 0)),
        # 25*32 + 32 + 25*32*64 + 64 + 7*7*64*512 + 512 + 512*10 + 10: the number in McMahan et al.
        (cnn, MNIST, {}, (1_663_370, 0)),
        # 75*64 + 64 + 25*64*64 + 64 + 1600*384 + 384 + 384*192 + 192 + 192*10 + 10
        (feddyn_cnn, CIFAR10, {}, (797_962, 0)),
        # conv 60 + 880, norm 12 + 32, latent 784*32 + 32, head 330; two running values a channel: 2*(6 + 16)
        (fedgen_net, MNIST, {}, (26_434, 44)),
        # a head of 26 classes: 32*26 + 26 = 858 instead of 330
        (fedgen_net, LETTERS, {}, (26_962, 44)),
        # conv 448 + 4,640 + 18,496, norm 2*112, latent 64*32 + 32 (84 pixels become 1), head 66; 2*112
        (fedgen_net, CELEBA, {"channels": [16, 32, 64], "pool": True}, (25_954, 224)),
        # 9*32 + 9*32*64 + 12*12*64*128 + 128*10: the number in Jeong et al.
        (fd_cnn, MNIST, {}, (1_199_648, 0)),
        # torchvision's 11,689,512 for 1000 classes, less 990*513; buffers 2*(64*5 + 128*5 + 256*5 + 512*5)
        (resnet18, CIFAR10, {}, (11_181_642, 9_600)),
        (resnet18, CIFAR100, {}, (11_227_812, 9_600)),
        # the stem's 7*7*3*64 weights become 3*3*3*64: 7,680 fewer; group normalisation has as many weights, no buffers
        (resnet18, CIFAR10, {"stem": "cifar"}, (11_173_962, 9_600)),
        (resnet18, CIFAR10, {"stem": "cifar", "norm": "group"}, (11_173_962, 0)),
    ],
)
def test_published_sizes(
    factory: Callable[..., nn.Module], spec: DataSpec, keys: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert sizes(factory, spec, **keys) == expected


FEDMD_SIZES = {  # channels: trained parameters at 28x28x1 and at 32x32x3, 16 outputs
    (128, 256): (989_440, 1_221_120),
    (128, 384): (1_483_392, 1_829_760),
    (128, 512): (1_977_344, 2_438_400),
    (256, 256): (1_285_888, 1_519_872),
    (256, 512): (2_568_704, 3_032_064),
    (64, 128, 256): (366_464, 367_616),
    (64, 128, 192): (283_328, 284_480),
    (128, 192, 256): (580_416, 582_720),
    (128, 128, 128): (233_728, 236_032),
    (128, 128, 192): (316_864, 319_168),
    # Table 2 has three more of three layers: with n of 64, 9*c*64 + 64 + 4*64*64 + 64 + 9*64*64 + 64 + 3*2*64 + 9*64*16
    (64, 64, 64): (63_616, 64_768),
    # 9*c*128 + 128 + 4*128*64 + 64 + 9*64*64 + 64 + 2*(128 + 64 + 64) + 9*64*16
    (128, 64, 64): (80_768, 83_072),
    # 9*c*64 + 64 + 4*64*64 + 64 + 9*64*128 + 128 + 2*(64 + 64 + 128) + 9*128*16
    (64, 64, 128): (109_888, 111_040),
    # and one of four, whose last convolution adds 9*64*64 + 64 + 2*64 to (64, 64, 64)
    (64, 64, 64, 64): (100_672, 101_824),
}


@pytest.mark.parametrize("channels", FEDMD_SIZES)
def test_sizes_of_the_fedmd_zoo(channels: tuple[int, ...]) -> None:
    expected = FEDMD_SIZES[channels]
    for parameters, shape in zip(expected, ((1, 28, 28), (3, 32, 32)), strict=True):
        assert sizes(fedmd_cnn, DataSpec(shape, 16), channels=channels) == (parameters, 2 * sum(channels))


def test_the_fedmd_zoo_is_both_tables() -> None:
    assert {channels for channels, _ in TABLE_1 + TABLE_2} == set(FEDMD_SIZES)
    assert len(TABLE_1) == len(TABLE_2) == 10
    assert [dropout for _, dropout in TABLE_1] == [0.2, 0.2, 0.2, 0.3, 0.4, 0.2, 0.2, 0.2, 0.3, 0.3]
    assert [dropout for _, dropout in TABLE_2] == [0.2, 0.2, 0.2, 0.3, 0.4, 0.2, 0.2, 0.2, 0.3, 0.2]


def test_fedmd_pools_over_the_cells_that_exist() -> None:
    """Rows 1 2 and 3 4: the mean of all is 2.5; of 2, 4 it is 3; of 3, 4 it is 3.5; the last cell has itself alone."""
    pooled = SameAveragePool()(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    assert torch.equal(pooled, torch.tensor([[[[2.5, 3.0], [3.5, 4.0]]]]))


def test_fedmd_starts_as_keras_does() -> None:
    """Glorot: uniform within sqrt(6 / (fan in + fan out)); 9*1 + 9*128 = 1,161 for the first kernel of one channel."""
    module = initialise(lambda: fedmd_cnn(MNIST), 1)
    weight = module.get_parameter("body.conv1.weight")
    bound = (6 / 1_161) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound
    assert module.get_parameter("body.conv2.bias").abs().max() == 0
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    drops = [part.p for part in fedmd_cnn(MNIST, channels=(8, 8, 8), dropout=0.3).modules() if hasattr(part, "p")]
    assert drops == [0.3, 0.3, 0.3]


def test_fedgen_head_is_330_parameters() -> None:
    head = fedgen_net(MNIST).get_submodule("head")
    assert sum(p.numel() for p in head.parameters()) == 330


@pytest.mark.parametrize("spec", [MNIST, CIFAR10, DIGITS, DataSpec((3, 16, 16), 7)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_splits_into_features_and_head(name: str, spec: DataSpec) -> None:
    if (name, spec) == ("feddyn_cnn", DIGITS) or name == "transformer":
        with pytest.raises(BadInput, match=rf"model\.name: '{name}' .*{re.escape(str(spec.input_shape))}"):
            build(factory_of(name), {}, spec, 1)
        return
    module = build(factory_of(name), {}, spec, 1).eval()
    x = torch.randn(2, *spec.input_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = module(x)
        features, head = split(module)
        assert torch.equal(head(features(x)), logits)
    assert logits.shape == (2, spec.classes) and logits.dtype == torch.float32
    assert features(x).shape == (2, head.in_features)
    last = ["head.weight"] if head.bias is None else ["head.weight", "head.bias"]
    assert [name for name, _ in module.named_parameters()][-len(last) :] == last


def test_fedgen_features_are_not_rectified() -> None:
    features, _ = split(initialise(lambda: fedgen_net(MNIST), 1))
    assert features(torch.randn(4, 1, 28, 28)).min() < 0


def test_split_refuses_what_has_no_head() -> None:
    with pytest.raises(BadInput, match="cannot be split"):
        split(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["cnn", "feddyn_cnn", "fedgen_net", "fedmd_cnn", "fd_cnn", "resnet18"])
@pytest.mark.parametrize("shape", [(64,), (28, 28), (2, 3, 8, 8)])
def test_image_models_refuse_other_shapes(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match=rf"model\.name: '{name}' .*{re.escape(str(shape))}"):
        factory_of(name)(DataSpec(shape, 3))


@pytest.mark.parametrize(("factory", "shape"), [(cnn, (1, 3, 3)), (feddyn_cnn, (3, 15, 15)), (fedmd_cnn, (1, 2, 2))])
def test_images_too_small_to_pool(factory: Callable[..., nn.Module], shape: tuple[int, ...]) -> None:
    """3 -> 1 -> 0 pixels in the first; 15 -> 11 -> 5 -> 1 -> 0 in the second; 2 for a kernel of 3 in the last."""
    with pytest.raises(BadInput, match=re.escape(str(shape))):
        factory(DataSpec(shape, 3))


def test_fedmd_of_three_layers_needs_twelve_pixels() -> None:
    """12 -> 6 -> 3 -> 1; 11 -> 5 -> 2, where a kernel of 3 does not fit."""
    assert sizes(fedmd_cnn, DataSpec((1, 12, 12), 2), channels=[1, 1, 1])[0] == 10 + 5 + 10 + 6 + 2
    with pytest.raises(BadInput, match="fedmd_cnn"):
        fedmd_cnn(DataSpec((1, 11, 11), 2), channels=[1, 1, 1])


def test_mlp_takes_any_shape_and_depth() -> None:
    spec = DataSpec((5,), 2)
    assert sizes(mlp, spec, hidden=[]) == (5 * 2 + 2, 0)
    assert sizes(mlp, spec, hidden=[3, 4]) == (5 * 3 + 3 + 3 * 4 + 4 + 4 * 2 + 2, 0)
    assert sizes(mlp, DataSpec((2, 3, 4, 5), 2), hidden=[1]) == (120 + 1 + 2 + 2, 0)
    x = torch.randn(4, 5)
    relu, tanh, gelu = (build(mlp, {"activation": name}, spec, 1)(x) for name in ("relu", "tanh", "gelu"))
    assert not torch.equal(relu, tanh) and not torch.equal(relu, gelu) and not torch.equal(tanh, gelu)


@pytest.mark.parametrize("name", MODELS)
def test_initial_parameters_are_a_function_of_the_seed(name: str) -> None:
    factory = factory_of(name)

    def parameters(seed: int) -> torch.Tensor:
        return FlatModel(build(factory, {}, spec_for(name), seed)).parameters.detach()

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = parameters(2**62)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(parameters(2**62), first)
    assert not torch.equal(parameters(1), first)


def test_the_trial_leaves_the_model_as_it_was() -> None:
    model = build(fedgen_net, {}, MNIST, 1)
    assert all(part.training for part in model.modules())
    assert model.get_buffer("body.norm1.running_mean").abs().max() == 0
    assert model.get_buffer("body.norm1.num_batches_tracked").item() == 0


def test_cifar_stem_keeps_the_resolution() -> None:
    """32x32 is 4x4 after three strides of two; torchvision's stem divides by four more, to 1x1."""
    for stem, size in (("cifar", 4), ("imagenet", 1)):
        seen: list[torch.Size] = []
        module = resnet18(CIFAR10, stem=stem).eval()  # type: ignore[arg-type]
        module.get_submodule("body.layer4").register_forward_hook(lambda _, __, output: seen.append(output.shape))  # noqa: B023
        module(torch.zeros(1, 3, 32, 32))
        assert seen == [(1, 512, size, size)]


def test_group_normalisation_has_that_many_groups() -> None:
    norms = [m for m in resnet18(CIFAR10, norm="group", groups=4).modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 20 and {norm.num_groups for norm in norms} == {4}


def own_function(spec: DataSpec) -> Any:
    return "a model"


def own_wrong(spec: DataSpec) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))


def test_what_a_factory_must_return() -> None:
    with pytest.raises(BadInput, match="own_function' returned a str"):
        build(own_function, {}, DIGITS, 1)
    with pytest.raises(BadInput, match=r"own_wrong' answers .*\(1, 8, 8\).*\(7,\).*\(10,\)"):
        build(own_wrong, {}, DIGITS, 1)
    with pytest.raises(BadInput, match=r"own_wrong' cannot take inputs of shape \(1, 28, 28\)"):
        build(own_wrong, {}, MNIST, 1)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("linear", {"hidden": 3}),
        ("mlp", {"hidden": 3}),
        ("mlp", {"hidden": [0]}),
        ("mlp", {"activation": "step"}),
        ("2nn", {"hidden": 0}),
        ("2nn", {"hidden": 2.5}),
        ("cnn", {"hidden": -1}),
        ("feddyn_cnn", {"channels": 0}),
        ("fedgen_net", {"channels": []}),
        ("fedgen_net", {"latent": 0}),
        ("fedgen_net", {"pool": 1}),
        ("fedmd_cnn", {"channels": [64]}),
        ("fedmd_cnn", {"channels": [64, 64, 64, 64, 64]}),
        ("fedmd_cnn", {"dropout": 1.0}),
        ("fd_cnn", {"hidden": 0}),
        ("resnet18", {"stem": "mnist"}),
        ("resnet18", {"norm": "layer"}),
        ("resnet18", {"groups": 3}),
        ("transformer", {"layers": 0}),
        ("transformer", {"embeddings": "pretrained"}),
        ("transformer", {"dropout": 1.0}),
    ],
)
def test_keys_of_a_job_are_checked(name: str, wrong: dict[str, Any]) -> None:
    (key,) = wrong
    with pytest.raises(BadInput, match=rf"model\.{key}"):
        bind(factory_of(name), wrong, "model", given=("spec",))


@pytest.mark.parametrize("name", MODELS)
def test_defaults_of_a_job_build_the_default_model(name: str) -> None:
    keys = bind(factory_of(name), {}, "model", given=("spec",))
    assert sizes(factory_of(name), spec_for(name), **keys) == sizes(factory_of(name), spec_for(name))


# --- docs/models.md -------------------------------------------------------------------------------------------------
def rows() -> dict[str, dict[str, str]]:
    """The page's table: name -> column -> cell."""
    lines = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip().strip("`") for cell in line] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in body}


def test_the_page_lists_every_model_and_key() -> None:
    assert list(rows()) == list(MODELS)
    for name, row in rows().items():
        _, *keys = inspect.signature(factory_of(name)).parameters
        assert re.findall(r"(\w+) =", row["keys"]) == keys


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", MODELS)
def test_the_pages_sizes(name: str, data: str) -> None:
    cell = rows()[name][data]
    if cell == "-":
        with pytest.raises(BadInput):
            factory_of(name)(DATA[data])
    else:
        assert sizes(factory_of(name), DATA[data])[0] == int(cell.replace(",", ""))


def test_the_pages_own_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"```python\n# my_models\.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "my_models.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    factory = resolve(MODELS, "my_models:small", "model.name")
    module = build(factory, bind(factory, {"width": 8}, "model", given=("spec",)), DIGITS, 1)
    features, head = split(module)
    assert head.weight.shape == (10, 8) and features(torch.zeros(1, 1, 8, 8)).shape == (1, 8)
    with pytest.raises(BadInput, match=r"model\.width"):
        bind(factory, {"width": 0}, "model", given=("spec",))
