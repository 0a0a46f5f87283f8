"""The text classifier: its size, what padding may not do, its trace; and the trace of other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpifed.errors import BadInput
from mpifed.models import build, initialise
from mpifed.models.classifier import split, trace
from mpifed.models.convolutional import fedgen_net
from mpifed.models.dense import mlp
from mpifed.models.flat import FlatModel
from mpifed.models.text import Layer, Transformer, transformer
from mpifed.types import DataSpec
from tests.algorithm_table import job_of, run

SPEC = DataSpec((12,), 5, vocabulary=30)
SMALL: dict[str, Any] = {"layers": 3, "width": 16, "heads": 4, "feedforward": 24}


def texts(*lengths: int, seed: int = 0) -> torch.Tensor:
    """Random texts of those lengths, `[len(lengths), 12]`, padded."""
    ids = torch.randint(1, 30, (len(lengths), 12), generator=torch.Generator().manual_seed(seed))
    return ids * (torch.arange(12) < torch.tensor(lengths)[:, None])


def model(seed: int = 0, **keys: Any) -> nn.Module:
    return initialise(lambda: transformer(SPEC, **(SMALL | keys)), seed)


# --- size -------------------------------------------------------------------------------------------------------------
def test_a_layer_has_the_parameters_of_berts() -> None:
    """4 * 768^2 + 2 * 768 * 3072, and 9,984 in vectors: 7,087,872."""
    parameters = list(Layer(768, 12, 3072, 0.1).parameters())
    assert sum(part.numel() for part in parameters) == 7_087_872
    assert sum(part.numel() for part in parameters if part.ndim == 1) == 9_984


@pytest.mark.parametrize(("embeddings", "in_table"), [("trained", 30 * 16), ("frozen", 0)])
def test_size(embeddings: str, in_table: int) -> None:
    """Positions 12 * 16; a layer 4 * 16^2 + 2 * 16 * 24 + 9 * 16 + 24; the last norm 2 * 16; the head 17 * 5."""
    flat = FlatModel(model(embeddings=embeddings))
    assert flat.layout.size == in_table + 12 * 16 + 3 * (1_024 + 768 + 144 + 24) + 32 + 85
    assert flat.buffer_layout.size == 0  # frozen embeddings do not travel


def test_frozen_embeddings_are_a_function_of_the_seed() -> None:
    one, same, other = (model(seed, embeddings="frozen").get_buffer("tokens") for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(one, model(1).get_parameter("tokens"))


# --- padding ----------------------------------------------------------------------------------------------------------
def test_padding_changes_nothing() -> None:
    """A text alone, and beside longer ones, that is with more padding, and in a longer array: the same logits."""
    module = model().eval()
    short, long = texts(4), texts(12, seed=1)
    alone = module(short)
    torch.testing.assert_close(module(torch.cat([short, long]))[:1], alone, rtol=1e-5, atol=1e-7)
    assert torch.equal(module(short[:, :4]), alone)
    # and without cutting the batch: the mask itself keeps padding out
    module.get_parameter("tokens").data[0] = 1e3
    torch.testing.assert_close(module(torch.cat([short, long]))[:1], alone, rtol=1e-5, atol=1e-7)


def test_padding_takes_no_part_in_the_gradient() -> None:
    module = model()
    module(torch.cat([texts(4), texts(12)])).square().sum().backward()
    table = module.get_parameter("tokens").grad
    assert table is not None and table[0].abs().max() == 0 and table.abs().max() > 0


def test_a_text_without_tokens_has_finite_logits_and_gradients() -> None:
    module = model()
    logits = module(texts(0, 3, 0))
    assert torch.equal(module.eval()(texts(0))[0], module.get_parameter("head.bias"))
    functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in module.parameters())


def test_order_matters() -> None:
    module = model().eval()
    x = texts(6)
    assert not torch.allclose(module(x), module(torch.cat([x[:, :6].flip(1), x[:, 6:]], dim=1)), atol=1e-6)


# --- the trace --------------------------------------------------------------------------------------------------------
def test_trace_of_a_text() -> None:
    module = model().eval()
    x = texts(2, 7, 5)
    seen = trace(module, x)
    features, head = split(module)
    assert torch.equal(seen.logits, module(x)) and torch.equal(seen.logits, head(features(x)))
    assert [state.shape for state in seen.hidden] == [(3, 7, 16)] * 3
    assert [maps.shape for maps in seen.attention] == [(3, 4, 7, 7)] * 3
    assert seen.mask is not None and seen.mask.sum(dim=1).tolist() == [2, 7, 5]
    for maps in seen.attention:
        torch.testing.assert_close(maps.sum(dim=-1), torch.ones(3, 4, 7))
        assert maps[0, :, :, 2:].abs().max() == 0 and maps[0, :, :, :2].min() > 0
    # the last hidden state leads to the logits: normalised, averaged over the tokens, through the head
    state = module.get_submodule("norm")(seen.hidden[-1][0, :2]).mean(dim=0)
    torch.testing.assert_close(module.get_submodule("head")(state), seen.logits[0])


def test_attention_maps_are_those_that_are_used() -> None:
    """With the identity for value and output, without norm and feed-forward, a layer adds attention @ state."""
    layer = Layer(4, 2, 3, 0.0).eval()
    with torch.no_grad():
        for part in (layer.value, layer.out):
            part.weight.copy_(torch.eye(4))
            part.bias.zero_()
        layer.down.weight.zero_()
        layer.down.bias.zero_()
    layer.norm1 = nn.Identity()  # type: ignore[assignment]
    state = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    after, maps = layer(state, torch.ones(1, 3, dtype=torch.bool))
    by_head = torch.cat([maps[0, 0] @ state[0, :, :2], maps[0, 1] @ state[0, :, 2:]], dim=1)
    torch.testing.assert_close(after[0] - state[0], by_head)


def test_attention_of_one_head_by_hand() -> None:
    """Width 1, query and key the identity, tokens 0 and 1: scores are products, so rows softmax(0, 0) and
    softmax(0, 1) = (0.2689, 0.7311)."""
    layer = Layer(1, 1, 1, 0.0)
    layer.norm1 = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        for part in (layer.query, layer.key):
            part.weight.fill_(1.0)
            part.bias.zero_()
    _, maps = layer(torch.tensor([[[0.0], [1.0]]]), torch.ones(1, 2, dtype=torch.bool))
    expected = torch.tensor([[0.5, 0.5], [0.26894142, 0.73105858]])
    torch.testing.assert_close(maps[0, 0], expected)


def test_trace_is_differentiable_and_maps_are_before_dropout() -> None:
    module = model(dropout=0.5).train()
    seen = trace(module, texts(6, 6))
    torch.testing.assert_close(seen.attention[1].sum(dim=-1), torch.ones(2, 4, 6))
    (seen.hidden[0].square().mean() + seen.attention[2].square().mean()).backward()
    for name in ("tokens", "layers.0.up.weight", "layers.2.query.weight"):
        gradient = module.get_parameter(name).grad
        assert gradient is not None and gradient.abs().max() > 0, name


@pytest.mark.parametrize("factory", [mlp, fedgen_net])
def test_trace_of_an_image_is_its_features(factory: Any) -> None:
    spec = DataSpec((1, 8, 8), 10)
    module = build(factory, {}, spec, 1).eval()
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = trace(module, x)
    features, _ = split(module)
    assert torch.equal(seen.logits, module(x)) and len(seen.hidden) == 1
    assert torch.equal(seen.hidden[0], features(x)) and seen.attention == () and seen.mask is None


# --- training and refusals --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("embeddings", ["trained", "frozen"])
def test_it_learns_which_token_is_there(embeddings: str) -> None:
    """Class = the one token of 2..6 among others, wherever it stands."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(7, 30, (128, 12), generator=generator)
    labels = torch.randint(5, (128,), generator=generator)
    x[torch.arange(128), torch.randint(8, (128,), generator=generator)] = labels + 2
    x[:, 8:] = 0
    module = model(embeddings=embeddings, dropout=0.0, layers=1, width=32)
    parameters = list(module.parameters())
    for _ in range(60):
        gradients = torch.autograd.grad(functional.cross_entropy(module(x), labels), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 3e-3 * gradient.sign()
    assert (module(x).argmax(dim=1) == labels).float().mean() > 0.9


def test_in_bfloat16() -> None:
    module = model().eval()
    x = texts(3, 12, 0)
    with torch.autocast("cpu", torch.bfloat16):
        seen = trace(module, x)
    assert seen.logits.isfinite().all()
    torch.testing.assert_close(seen.logits.float(), module(x), rtol=0.1, atol=0.02)


def test_a_federation_learns_from_text(tmp_path: Path) -> None:
    """The class is the last word; of 96 questions, three clients. Frozen embeddings leave d numbers to be sent:
    positions 5 * 16, a layer 4 * 256 + 2 * 16 * 512 + 9 * 16 + 512, the norm 32, the head 17 * 6."""
    words = {"ABBR": "short", "DESC": "what", "ENTY": "thing", "HUM": "who", "LOC": "where", "NUM": "many"}
    lines = [f"{label}:x the {filler} {word}\n" for label, word in words.items() for filler in "abcdefghijklmnop"]
    (tmp_path / "text/trec").mkdir(parents=True)
    for name in ("train_5500.label", "TREC_10.label"):
        (tmp_path / "text/trec" / name).write_text("".join(lines))
    job = job_of(
        {"name": "fedavg"},
        rounds=4,
        clients=3,
        participation=1.0,
        model={"name": "transformer", "layers": 1, "width": 16, "dropout": 0.0, "embeddings": "frozen"},
        data={"name": "trec", "root": str(tmp_path), "length": 5, "min_count": 1, "partition": {"name": "iid"}},
        local={"epochs": 4, "batch_size": 8, "lr": 0.01, "optimizer": "adam"},
    )
    outcome = run(job, tmp_path)
    d = 80 + 1_024 + 16_384 + 144 + 512 + 32 + 102
    assert outcome.logical()[1, "up.update"] == 3 * 4 * d
    assert (1, "down.buffers") not in outcome.logical()
    assert outcome.rows[-1]["accuracy"] > 0.9


def test_refusals() -> None:
    with pytest.raises(BadInput, match=r"model\.name: 'transformer' needs texts, .*\(1, 28, 28\)"):
        transformer(DataSpec((1, 28, 28), 10))
    with pytest.raises(BadInput, match=r"model\.heads = 3 does not divide model\.width = 16"):
        transformer(SPEC, width=16, heads=3)
    with pytest.raises(BadInput, match=r"'mlp' cannot take inputs of shape \(12,\)"):
        build(mlp, {}, SPEC, 0)
    with pytest.raises(BadInput, match=r"'fedgen_net' needs images .*'transformer' for text"):
        build(fedgen_net, {}, SPEC, 0)
    assert isinstance(build(transformer, SMALL, SPEC, 0), Transformer)
