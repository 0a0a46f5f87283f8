"""Codecs: what arrives, and that it takes the bytes that were foretold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifed.codecs import CODECS, make, parse
from mpifed.codecs.half import Half
from mpifed.codecs.identity import Identity, from_bytes, to_bytes
from mpifed.codecs.lowrank import RANGE_FINDER_FROM, _by_gram, _by_range_finder, largest_rank, truncated
from mpifed.codecs.parts import parts
from mpifed.codecs.powersgd import PowerSgd
from mpifed.codecs.quantize import Quantize, _packed, _unpacked
from mpifed.codecs.svd import DENSE, Svd
from mpifed.codecs.topk import TopK
from mpifed.component import parameters, resolve
from mpifed.errors import BadInput
from mpifed.types import Layout, State

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)
LOSSY = tuple(dtype for dtype in DTYPES if dtype in (torch.float32, torch.float64))
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (2, 3), (3, 0, 2), (2, 2, 2))

TEXTS = (
    "identity",
    "half",
    "svd(energy=0.9)",
    "svd(energy=[0.5, 0.99], floor=0.2)",
    "svd(energy=0.9, feedback=true)",
    "quantize(bits=2)",
    "quantize(bits=4, norm='max')",
    "quantize",
    "quantize(bits=16)",
    "topk(fraction=0.1)",
    "topk(fraction=0.1, feedback=false)",
    "powersgd",
    "powersgd(rank=1, min_rate=1.0, warm_start=false, feedback=false)",
)
every_codec = pytest.mark.parametrize("codec", [make(text, "codec") for text in TEXTS], ids=TEXTS)

LAYOUT = Layout(
    ("conv", "conv.bias", "pointwise", "attention", "body.embedding", "empty", "zero", "head", "scalar"),
    ((8, 4, 3, 3), (3,), (16, 16, 1, 1), (1, 200), (30, 12), (0, 5), (12, 9), (10, 64), ()),
)
"""A convolution, a bias of three, a 1x1 convolution, a matrix with a side of 1, ... of which `model` zeroes one."""


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(1))
    return (values % 2 == 0) if dtype == torch.bool else values.to(dtype)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A value of `LAYOUT`: noise on matrices of rank 2, so that codecs have something to find; `zero` is zero."""
    value = noise(LAYOUT.size, seed=seed, dtype=dtype) * 0.1
    for name, view in LAYOUT.views(value).items():
        if view.dim() >= 2 and view.numel():
            rows, columns = len(view), view.numel() // len(view)
            view += (noise(rows, 2, seed=seed + 1) @ noise(2, columns, seed=seed + 2)).view(view.shape)
        if name == "zero":
            view.zero_()
    return value


def sent(
    codec: Any, value: Tensor, layout: Layout | None = None, memory: State | None = None, seed: int = 0
) -> tuple[Tensor, State]:
    """What arrives of a value halfway through a run, and what the codec remembers."""
    data, kept = codec.encode(value, layout, memory or {}, 0.5, seed)
    assert data.dtype == torch.uint8 and data.dim() == 1
    assert len(data) == (codec.nbytes(tuple(value.shape), value.dtype, layout) or len(data))
    again = codec.decode(data, tuple(value.shape), value.dtype, layout)
    assert again.dtype == value.dtype and again.shape == value.shape
    return again, kept


def distance(one: Tensor, other: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((one.double() - other.double()).norm() / other.double().norm())


# --- every codec ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", [Identity(), Half()], ids=["identity", "half"])
def test_small_whole_numbers_survive_identity_and_half(codec: Any, dtype: torch.dtype) -> None:
    """Up to 99, which float16 holds exactly; and the bytes are as many as the shape foretells."""
    for shape in SHAPES:
        value = sample(shape, dtype)
        again, memory = sent(codec, value)
        assert memory == {} and codec.nbytes(shape, dtype, None) is not None
        assert torch.equal(again, value)


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_compressed_keeps_every_bit(codec: Any, dtype: torch.dtype) -> None:
    """Whole numbers and short floats of any shape, and every float that is too small to be worth it."""
    for shape in SHAPES:
        value = sample(shape, dtype)
        again, _ = sent(codec, value)
        if dtype not in LOSSY or (math.prod(shape) == 0):
            assert torch.equal(again, value)


@every_codec
@pytest.mark.parametrize("dtype", LOSSY, ids=str)
def test_a_model_arrives(codec: Any, dtype: torch.dtype) -> None:
    """Nearer than nothing at all (quantised to few bits it may be further, and yet right in the mean)."""
    again, _ = sent(codec, model(dtype=dtype), LAYOUT)
    if not isinstance(codec, Quantize):
        assert distance(again, model()) < 0.9
    assert not LAYOUT.views(again)["zero"].any()


@every_codec
def test_nothing_that_is_given_is_changed(codec: Any) -> None:
    """Neither the value nor the memory nor the bytes."""
    value = model()
    data, memory = codec.encode(value, LAYOUT, {}, 0.5)
    given = [value, data, *memory.values()]
    before = [tensor.clone() for tensor in given]
    codec.encode(value, LAYOUT, memory, 0.5)
    codec.decode(data, (LAYOUT.size,), value.dtype, LAYOUT)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


@every_codec
def test_the_same_bits_wherever_they_lie(codec: Any) -> None:
    """Encoding and decoding again, from other places in memory and between other draws of torch's own generator."""
    value = model()
    data, memory = codec.encode(value, LAYOUT, {}, 0.5)
    again = codec.decode(data, (LAYOUT.size,), value.dtype, LAYOUT)
    for offset in range(1, 5):
        torch.rand(offset)
        moved = torch.zeros(LAYOUT.size + offset)[offset:].copy_(value)
        other, kept = codec.encode(moved, LAYOUT, {}, 0.5)
        assert torch.equal(other, data) and kept.keys() == memory.keys()
        assert all(torch.equal(kept[name], memory[name]) for name in kept)
        buffer = torch.zeros(len(data) + offset, dtype=torch.uint8)[offset:].copy_(data)
        twin = codec.decode(buffer, (LAYOUT.size,), value.dtype, LAYOUT)
        assert torch.equal(twin.view(torch.int32), again.view(torch.int32))


@every_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_arrive_as_if_it_were(codec: Any, bad: float) -> None:
    """The exchange refuses such uploads; a diverged server's download must neither stop a rank nor look healthy."""
    value = model()
    LAYOUT.views(value)["head"][3, 5] = bad
    if isinstance(codec, Half) and math.isinf(bad):
        return  # cut to 65,504, as documented
    again, _ = sent(codec, value, LAYOUT)
    assert not LAYOUT.views(again)["head"].isfinite().all()


@every_codec
def test_a_value_that_is_not_its_layout_is_refused(codec: Any) -> None:
    if not isinstance(codec, Identity | Half | TopK):
        with pytest.raises(ValueError, match=r"of shape \(7,\) does not have the \d+ elements of its layout"):
            codec.encode(torch.ones(7), LAYOUT, {}, 0.5)


def decoded_or_refused(codec: Any, data: Tensor) -> bool:
    """Whether bytes were decoded into a tensor of the expected shape; if not, they are named damaged."""
    try:
        again = codec.decode(data, (LAYOUT.size,), torch.float32, LAYOUT)
    except ValueError as error:
        assert "damaged" in str(error)
        return False
    assert again.shape == (LAYOUT.size,)
    return True


CHECKED = [make(text, "codec") for text in TEXTS if text not in ("identity", "half")]


@settings(deadline=None, max_examples=150)
@given(codec=st.sampled_from(CHECKED), data=st.binary(max_size=5000))
def test_any_bytes_are_decoded_or_refused(codec: Any, data: bytes) -> None:
    decoded_or_refused(codec, torch.tensor(list(data), dtype=torch.uint8))


@settings(deadline=None, max_examples=150)
@given(codec=st.sampled_from(CHECKED), length=st.integers(0, 10_000), more=st.binary(min_size=1, max_size=9))
def test_bytes_that_are_cut_or_longer_are_refused(codec: Any, length: int, more: bytes) -> None:
    data, _ = codec.encode(model(), LAYOUT, {}, 0.5)
    assert decoded_or_refused(codec, data)
    assert not decoded_or_refused(codec, data[: length % len(data)])
    assert not decoded_or_refused(codec, torch.cat([data, torch.tensor(list(more), dtype=torch.uint8)]))


@settings(deadline=None, max_examples=150)
@given(codec=st.sampled_from(CHECKED), changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1))
def test_changed_bytes_are_decoded_or_refused(codec: Any, changes: list[tuple[int, int]]) -> None:
    data, _ = codec.encode(model(), LAYOUT, {}, 0.5)
    for place, byte in changes:
        data[place % len(data)] = byte
    decoded_or_refused(codec, data)


# --- error feedback ---------------------------------------------------------------------------------------------------
FEEDBACK = (TopK(0.1), Svd(0.6, feedback=True), PowerSgd(1))


@pytest.mark.parametrize("codec", FEEDBACK, ids=lambda codec: type(codec).__name__)
def test_what_was_left_out_is_remembered(codec: Any) -> None:
    """The residual is value + last residual - decoded, bit for bit, for three rounds."""
    memory: State = {}
    for seed in range(3):
        value = model(seed)
        whole = value + memory.get("residual", torch.zeros_like(value))
        again, memory = sent(codec, value, LAYOUT, memory)
        assert torch.equal(memory["residual"], whole - again)
        torch.testing.assert_close(again + memory["residual"], whole, rtol=0, atol=1e-6)
        assert memory["residual"].norm() > 0


def test_topk_loses_nothing_bit_for_bit() -> None:
    """Each entry is either sent or remembered: value = decoded + residual, exactly."""
    again, memory = sent(TopK(0.1), model(), LAYOUT)
    assert torch.equal(again + memory["residual"], model())


@pytest.mark.parametrize("codec", FEEDBACK, ids=lambda codec: type(codec).__name__)
def test_in_time_everything_arrives(codec: Any) -> None:
    """The mean of what arrives of one value over and over tends to it: the rest stays bounded."""
    memory: State = {}
    total, rounds = torch.zeros(LAYOUT.size), 60
    once, _ = sent(codec, model(), LAYOUT)
    for _ in range(rounds):
        again, memory = sent(codec, model(), LAYOUT, memory)
        total += again
    assert distance(total / rounds, model()) < 0.35 * distance(once, model())


# --- identity and half ------------------------------------------------------------------------------------------------
def test_identity_keeps_every_bit() -> None:
    """NaN with a payload, infinities, the smallest subnormal and minus zero."""
    bits = torch.tensor([0x7FC01234, 0x7F800000, 0x00000001, -0x80000000], dtype=torch.int32)
    value = bits.view(torch.float32)
    again = Identity().decode(Identity().encode(value, None, {}, 0.0)[0], (4,), torch.float32, None)
    assert torch.equal(again.view(torch.int32), bits)


def test_a_strided_tensor_is_sent_as_it_reads() -> None:
    value = torch.arange(12.0).view(3, 4).t()[::2]
    assert torch.equal(from_bytes(to_bytes(value), (2, 3), torch.float32), torch.tensor([[0.0, 4, 8], [2, 6, 10]]))


@pytest.mark.parametrize("offset", range(9))
def test_bytes_at_any_place_of_a_buffer(offset: int) -> None:
    value = torch.tensor([1.5, -2.25], dtype=torch.float64)
    buffer = torch.zeros(40, dtype=torch.uint8)
    buffer[offset : offset + 16] = to_bytes(value)
    assert torch.equal(from_bytes(buffer[offset : offset + 16], (2,), torch.float64), value)


def test_half_rounds_to_the_nearest_and_cuts_what_is_too_large() -> None:
    """float16 has 11 significant bits: 1/3 becomes 1365/4096; 2049 lies between 2048 and 2050, and goes to the even."""
    sent = torch.tensor([1 / 3, 2049.0, 1e9, -1e9, 65504.0, 2**-24, 2**-26])
    expected = torch.tensor([1365 / 4096, 2048.0, 65504.0, -65504.0, 65504.0, 2**-24, 0.0])
    for dtype in (torch.float32, torch.float64):
        data, _ = Half().encode(sent.to(dtype), None, {}, 0.0)
        assert len(data) == 2 * 7
        assert torch.equal(Half().decode(data, (7,), dtype, None), expected.to(dtype))


def test_half_is_within_its_promise() -> None:
    value = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    value = value[value.abs() > 2**-14]  # below are float16's subnormals
    again = Half().decode(Half().encode(value, None, {}, 0.0)[0], tuple(value.shape), torch.float32, None)
    assert ((again - value).abs() <= value.abs() * 2**-11).all()


def test_half_of_half_is_the_same() -> None:
    once = Half().decode(Half().encode(torch.tensor([1 / 3]), None, {}, 0.0)[0], (1,), torch.float32, None)
    twice = Half().decode(Half().encode(once, None, {}, 0.0)[0], (1,), torch.float32, None)
    assert torch.equal(once, twice)


# --- svd --------------------------------------------------------------------------------------------------------------
def spectrum(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """float64 `[rows, columns]` with these singular values."""
    left = torch.linalg.qr(noise(rows, len(values), seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(noise(columns, len(values), seed=seed + 1, dtype=torch.float64)).Q
    return left * values @ right.T


def tags(codec: Svd, value: Tensor, layout: Layout | None = None, progress: float = 0.5) -> list[int]:
    data, _ = codec.encode(value, layout, {}, progress)
    return codec.tags(data, tuple(value.shape), value.dtype, layout)


def test_svd_ranks_by_hand() -> None:
    """Energies 16, 4, 4, 1 of 25: 0.64, 0.80, 0.96, 1. The share has to be above T, not at it."""
    matrix = torch.zeros(12, 15)
    for i, value in enumerate((4.0, 2.0, 2.0, 1.0)):
        matrix[i, 2 * i] = value
    shares = {0.01: 1, 0.63: 1, 0.64: 2, 0.65: 2, 0.79: 2, 0.8: 3, 0.95: 3, 0.96: 4, 0.97: 4}
    assert {share: tags(Svd(share), matrix)[0] for share in shares} == shares
    again, _ = sent(Svd(0.65), matrix)
    kept = matrix.clone()
    kept[3, 6] = 0
    assert torch.equal(again[0], kept[0]) and again[3].abs().max() == 0 and distance(again, kept) < 0.6


SPECTRA = [(64, 576), (10, 512), (96, 96), (200, 40), (128, 300)]


@pytest.mark.parametrize("decay", [0.3, 0.7, 1.5, 3.0])
@pytest.mark.parametrize(("rows", "columns"), SPECTRA)
def test_svd_keeps_the_energy_that_was_asked_for_and_no_more(rows: int, columns: int, decay: float) -> None:
    """sigma_i = i^-decay. Within 1e-6 the energy of rank K is above T, that of K - 1 is not, and the error is that of
    the best approximation."""
    matrix = spectrum(rows, columns, torch.arange(1, min(rows, columns) + 1, dtype=torch.float64) ** -decay)
    energies = torch.linalg.svdvals(matrix.float().double()).square().cumsum(0)
    energies /= energies[-1].clone()
    for share in (0.3, 0.8, 0.95, 0.965, 0.98, 0.999, 1 - 1e-5):
        (rank,) = tags(Svd(share), matrix.float())
        most = largest_rank(rows, columns)
        if rank == DENSE:
            assert most == 0 or energies[most - 1] <= share + 1e-6
            continue
        assert 1 <= rank <= most
        assert energies[rank - 1] > share - 1e-6 and (rank == 1 or energies[rank - 2] <= share + 1e-6)
        again, _ = sent(Svd(share), matrix.float())
        lost = float((again.double() - matrix).square().sum() / matrix.square().sum())
        assert lost == pytest.approx(1 - float(energies[rank - 1]), rel=1e-2, abs=1e-9)


def test_svd_of_all_energy_is_the_identity() -> None:
    """No rank has more than all of it, so everything travels as it is, with one tag a matrix."""
    again, _ = sent(Svd(1.0), model(), LAYOUT)
    assert torch.equal(again, model())
    matrices = sum(1 for part in parts((LAYOUT.size,), LAYOUT) if part.name in ("conv", "pointwise", "head", "zero"))
    data, _ = Svd(1.0).encode(model(), LAYOUT, {}, 0.5)
    assert matrices == 4 and len(data) == 4 * LAYOUT.size + 4 * 5 - 4 * 12 * 9  # 5 with the embedding; `zero` is free


def test_svd_of_exact_low_rank_is_the_matrix() -> None:
    """Up to rounding, once the share is beyond what rounding leaves of the other singular values."""
    matrix = noise(40, 3) @ noise(3, 90, seed=1)
    again, _ = sent(Svd(1 - 1e-9), matrix)
    assert tags(Svd(1 - 1e-9), matrix) == [3] and distance(again, matrix) < 1e-6


def test_svd_bytes_are_the_formula() -> None:
    """4 for each tag; 4 K (P + Q) for factors, nothing for zeros, 4 P Q and 4 n for what travels as it is."""
    codec = Svd(0.9)
    data, _ = codec.encode(model(), LAYOUT, {}, 0.5)
    ranks = dict(
        zip(("conv", "pointwise", "body.embedding", "zero", "head"), tags(codec, model(), LAYOUT), strict=True)
    )
    assert ranks == {"conv": 2, "pointwise": 2, "body.embedding": 2, "zero": 0, "head": 2}
    sides = {"conv": (8, 36), "pointwise": (16, 16), "body.embedding": (30, 12), "zero": (12, 9), "head": (10, 64)}
    expected = 4 * 5 + 4 * sum(ranks[name] * sum(sides[name]) for name in sides) + 4 * (3 + 200 + 1)
    assert len(data) == expected < 4 * LAYOUT.size
    assert codec.nbytes((LAYOUT.size,), torch.float32, LAYOUT) is None
    assert codec.nbytes((7,), torch.float32, None) == 28


@pytest.mark.parametrize("share", [0.95, 0.965, 0.98, 1.0])
@pytest.mark.parametrize(
    "shape", [(10, 512), (2, 512), (3, 512), (1, 200), (200, 1), (3,), (16, 16, 1, 1), (64, 3, 3, 3)]
)
def test_svd_never_drops_what_needs_its_full_rank(share: float, shape: tuple[int, ...]) -> None:
    """Heads, vectors and kernels as they are initialised: other implementations send nothing of them at all."""
    value = noise(*shape)
    again, _ = sent(Svd(share), value)
    assert distance(again, value) ** 2 <= 1 - share + 1e-6
    if min(shape[0], math.prod(shape[1:])) == 1:
        assert torch.equal(again, value)


def test_svd_of_zeros_costs_its_tag() -> None:
    data, _ = Svd().encode(torch.zeros(30, 40), None, {}, 0.5)
    assert len(data) == 4 and torch.equal(Svd().decode(data, (30, 40), torch.float32, None), torch.zeros(30, 40))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1e20, 1e30, 3e37])
def test_svd_of_very_small_and_very_large_numbers(scale: float) -> None:
    """Whose squares float32 does not hold."""
    value = (noise(20, 2) @ noise(2, 30, seed=1)).clamp(-4, 4).double() * scale
    again, _ = sent(Svd(0.9), value.float())
    limit = 0.32 if scale > 1e-40 else 0.7  # float32 itself has a digit and a half there
    assert distance(again, value) < limit
    assert tags(Svd(0.9), value.float())[0] in (1, 2, 3, 4)


def test_svd_schedule() -> None:
    """From 0.95 to 0.98 by default: round t of 20 has 0.95 + 0.03 t / 20; more energy is never a smaller rank."""
    assert [Svd().threshold(t / 20) for t in (1, 10, 20)] == pytest.approx([0.9515, 0.965, 0.98])
    assert Svd(0.9).threshold(0.1) == Svd(0.9).threshold(1.0) == 0.9
    assert Svd().scheduled and not Svd(0.9).scheduled
    value = spectrum(100, 120, torch.arange(1, 101, dtype=torch.float64) ** -0.8).float()
    ranks = [tags(Svd((0.5, 0.95)), value, progress=t / 10)[0] for t in range(1, 11)]
    assert ranks == sorted(ranks) and len(set(ranks)) > 5


def test_svd_floor_smallest_and_skip() -> None:
    """Ranks at least a fifth of 8, 16, 12 and 10, rounded up; small tensors, and embeddings, as they are."""
    assert tags(Svd(0.1), model(), LAYOUT) == [1, 1, 1, 0, 1]
    assert tags(Svd(0.1, floor=0.2), model(), LAYOUT) == [2, 4, 3, 0, 2]
    assert tags(Svd(0.1, floor=1.0), model(), LAYOUT) == [DENSE, DENSE, DENSE, 0, DENSE]
    assert tags(Svd(0.1, smallest=260), model(), LAYOUT) == [1, 1, 1]  # pointwise 256 and zero 108 have no tag
    codec = Svd(0.1, skip=("embedding", "head"))
    assert tags(codec, model(), LAYOUT) == [1, 1, 0]
    again, _ = sent(codec, model(), LAYOUT)
    for name in ("body.embedding", "head", "conv.bias", "attention", "scalar"):
        assert torch.equal(LAYOUT.views(again)[name], LAYOUT.views(model())[name])


def test_svd_of_many_alike_is_that_of_each() -> None:
    """Matrices of one shape are worked on together."""
    stack = torch.stack([noise(20, 3, seed=i) @ noise(3, 50, seed=i + 9) for i in range(5)])
    stack[2] = 0
    stack[4, 1, 1] = math.nan
    together = truncated(stack, 0.9)
    for matrix, factors in zip(stack, together, strict=True):
        (alone,) = truncated(matrix[None], 0.9)
        assert (alone is None) == (factors is None) == bool(matrix.isnan().any())
        if alone is not None and factors is not None:
            assert alone.rank == factors.rank
            torch.testing.assert_close(alone.left @ alone.right, factors.left @ factors.right)


LARGE = noise(RANGE_FINDER_FROM, RANGE_FINDER_FROM) / RANGE_FINDER_FROM**0.5


@pytest.mark.parametrize("share", [0.8, 0.95, 0.98])
@pytest.mark.parametrize("decay", [1.0, 1.5, 3.0])
def test_range_finder_finds_what_the_gram_matrix_finds(decay: float, share: float) -> None:
    """Of 768 singular values i^-decay few are enough: the energy is above T, the rank the smallest or one above it."""
    n, columns = RANGE_FINDER_FROM, RANGE_FINDER_FROM + 40
    matrix = LARGE * torch.arange(1, n + 1) ** -decay @ noise(columns, n, seed=1).T / columns**0.5
    pair = _by_range_finder(matrix, share, 1, n // 8)
    (exact,) = _by_gram(matrix[None].double(), share, 1, n)
    assert pair is not None and exact is not None
    smallest = exact[0].shape[1]
    assert smallest <= pair[0].shape[1] <= smallest + 1
    kept = float((pair[0] @ pair[1]).double().square().sum() / matrix.double().square().sum())
    assert kept > share - 1e-6
    lost = float((pair[0] @ pair[1] - matrix).double().square().sum() / matrix.double().square().sum())
    assert lost == pytest.approx(1 - kept, abs=1e-5)  # a projection
    chosen = truncated(matrix[None].mT, share)[0]  # a tall one
    assert chosen is not None and torch.equal(chosen.right, pair[0].T)
    assert _by_range_finder(matrix, share, smallest + 20, n // 8)[0].shape[1] == smallest + 20  # type: ignore[index]


def test_range_finder_gives_way_where_ranks_are_not_few() -> None:
    """A flat spectrum: after the first block it is clear that 96 columns are too few; the Gram matrix is exact."""
    assert _by_range_finder(LARGE, 0.95, 1, 96) is None
    assert _by_range_finder(LARGE, 0.01, 90, 96) is None  # 90 and some to spare are more than 96
    chosen = truncated(torch.cat([LARGE, LARGE], dim=1)[None], 0.5)[0]
    (exact,) = _by_gram(torch.cat([LARGE, LARGE], dim=1)[None], 0.5, 1, 512)
    assert chosen is not None and exact is not None and torch.equal(chosen.left, exact[0])


def test_svd_refuses_ranks_that_cannot_be() -> None:
    """A rank whose factors would be larger than the matrix is never sent, and never allocated."""
    data, _ = Svd(0.5).encode(noise(30, 40), None, {}, 0.5)
    for rank in (-2, 18, 30, 2**31 - 1):
        wrong = torch.cat([to_bytes(torch.tensor([rank], dtype=torch.int32)), data[4:]])
        with pytest.raises(ValueError, match=rf"svd: {rank} is no rank of a matrix of 30 x 40"):
            Svd(0.5).decode(wrong, (30, 40), torch.float32, None)


# --- quantize ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_every_code_is_packed_and_found_again(bits: int) -> None:
    """The first code is in the lowest bits; a last byte that is not full is filled with zeros."""
    codes = torch.arange(2**bits, dtype=torch.int32)
    for n in (0, 1, 2**bits - 1, 2**bits):
        packed = _packed(codes[:n], bits)
        assert packed.dtype == torch.uint8 and len(packed) == -(-n * bits // 8)
        assert torch.equal(_unpacked(packed, n, bits), codes[:n])
    assert {2: [0b11100100], 4: [0b00010000, 0b00110010], 8: [0, 1, 2, 3], 16: [0, 0, 1, 0, 2, 0, 3, 0]}[bits] == (
        _packed(torch.arange(4, dtype=torch.int32), bits).tolist()
    )


@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_quantize_is_right_in_the_mean_and_one_level_off_at_most(bits: Any, norm: Any) -> None:
    """1,000 draws: five standard errors."""
    codec, value = Quantize(bits, norm), noise(12)
    step = float(value.norm() if norm == "l2" else value.abs().max()) / codec.levels
    total, seen, draws = torch.zeros(12, dtype=torch.float64), set(), 1000
    for draw in range(draws):
        again, _ = sent(codec, value, seed=draw)
        assert ((again - value).abs() <= step * (1 + 1e-5)).all()
        total += again
        seen.add(tuple(again.tolist()))
    assert ((total / draws - value).abs() <= 5 * step / 2 / draws**0.5).all()
    assert len(seen) > 10


def test_quantize_by_hand() -> None:
    """(3, -4) has norm 5; with two bits s = 1, and entries become 0 or +-5. Of one entry the norm is its magnitude."""
    again, _ = sent(Quantize(2), torch.tensor([3.0, -4.0]))
    assert again[0] in (0.0, 5.0) and again[1] in (0.0, -5.0)
    for bits in (2, 4, 8, 16):
        assert sent(Quantize(bits), torch.tensor([-0.3]))[0].item() == pytest.approx(-0.3, rel=1e-6)
    assert not sent(Quantize(), torch.zeros(9))[0].any()


def test_quantize_rounds_every_entry_by_itself() -> None:
    """64 entries half way between two levels, and one that is the norm: about half of them go up, and not all or none.

    Ten to 54 of them, but for one draw in 10^8.
    """
    value = torch.tensor([1.0] + [0.5] * 64)
    again, _ = sent(Quantize(2, "max"), value)
    assert 10 <= int((again[1:] == 1).sum()) <= 54 and set(again.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_quantize_bytes(bits: Any) -> None:
    """4 a tensor for its norm, and `bits` an entry, tensor by tensor rounded up to a byte."""
    expected = sum(4 + math.ceil(size * bits / 8) for size in LAYOUT.sizes)
    assert Quantize(bits).nbytes((LAYOUT.size,), torch.float32, LAYOUT) == expected
    assert Quantize(bits).nbytes((5, 7), torch.float64, None) == 8 + math.ceil(35 * bits / 8)
    assert Quantize(bits).nbytes((5, 7), torch.int64, None) == 8 * 35


def test_quantize_of_the_largest_numbers() -> None:
    """Whose norm float32 does not hold."""
    value = torch.full((100,), 3e38)
    assert sent(Quantize(16), value)[0].isfinite().all()
    assert distance(sent(Quantize(16, "max"), value)[0], value) < 1e-6


# --- topk -------------------------------------------------------------------------------------------------------------
def test_topk_by_hand() -> None:
    """Two of ten: -5 and 3. The others are kept; then 0.5 + 0.5 is beside 2 the largest."""
    value = torch.tensor([0.5, -5.0, 0, 0, 3.0, 0.1, 0, 0, 0, -0.4])
    data, memory = TopK(0.2).encode(value, None, {}, 0.0)
    assert data[:8].view(torch.int32).tolist() == [1, 4] and data[8:].view(torch.float32).tolist() == [-5.0, 3.0]
    rest = value.clone()
    rest[[1, 4]] = 0
    assert torch.equal(memory["residual"], rest)
    following = torch.zeros(10)
    following[0], following[9] = 0.5, -0.2
    again, memory = sent(TopK(0.2), following, None, memory)
    torch.testing.assert_close(again, torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 0, -0.6]))
    torch.testing.assert_close(memory["residual"], torch.tensor([0.0, 0, 0, 0, 0, 0.1, 0, 0, 0, 0]))


def test_topk_bytes() -> None:
    """k (4 + 4) bytes, k rounded half up and at least one; all entries without places where that is no more."""
    for n, fraction, expected in ((1000, 0.01, 80), (1000, 0.0001, 8), (150, 0.01, 16), (149, 0.01, 8), (10, 0.5, 40)):
        assert TopK(fraction).nbytes((n,), torch.float32, None) == expected
        assert len(TopK(fraction).encode(noise(n), None, {}, 0.0)[0]) == expected
    assert TopK(0.01).nbytes((1000,), torch.float64, None) == 10 * 12
    assert torch.equal(sent(TopK(0.5), noise(10))[0], noise(10))


def test_topk_refuses_places_that_cannot_be() -> None:
    data, _ = TopK(0.2).encode(noise(10), None, {}, 0.0)
    for places in ([-1, 3], [3, 10], [3, 3], [4, 3]):
        wrong = torch.cat([to_bytes(torch.tensor(places, dtype=torch.int32)), data[8:]])
        with pytest.raises(ValueError, match="topk: the places are not 2 ascending ones below 10"):
            TopK(0.2).decode(wrong, (10,), torch.float32, None)


# --- powersgd ---------------------------------------------------------------------------------------------------------
def test_powersgd_of_its_own_rank_is_the_identity() -> None:
    """M Q spans the columns of M when M has no more than that rank: then P P^T M is M."""
    matrix = noise(40, 3) @ noise(3, 90, seed=1)
    again, _ = sent(PowerSgd(3), matrix)
    assert distance(again, matrix) < 1e-5
    assert distance(sent(PowerSgd(2), matrix)[0], matrix) > 0.1


def test_powersgd_closes_in_on_the_best_approximation() -> None:
    """A power iteration, one step a round, from the last round's Q."""
    matrix = spectrum(40, 60, torch.tensor([5.0, 4.0, 1.0, 1.0, 0.5], dtype=torch.float64)).float()
    codec, memory = PowerSgd(2, feedback=False), {}
    errors = []
    for _ in range(6):
        again, memory = sent(codec, matrix, None, memory)
        errors.append(distance(again, matrix))
    best = (2.25 / (25 + 16 + 2.25)) ** 0.5
    assert errors[0] > errors[1] > best * 1.0001 and errors[-1] == pytest.approx(best, rel=1e-4)
    cold = PowerSgd(2, warm_start=False, feedback=False)
    assert not cold.stateful and sent(cold, matrix)[1] == {}


def test_powersgd_goes_on_after_a_zero() -> None:
    """A zero leaves Q zero, from which a power iteration alone would never return."""
    codec, value = PowerSgd(2, feedback=False), noise(40, 2) @ noise(2, 60, seed=1)
    again, memory = sent(codec, torch.zeros(40, 60))
    assert not again.any() and not memory["start"].any()
    for _ in range(3):
        again, memory = sent(codec, value, None, memory)
    assert distance(again, value) < 1e-4


def test_powersgd_bytes() -> None:
    """4 r (n + m) where 2 r (n + m) < n m, else 4 n m; 4 n for vectors. [8, 36] with r = 2: 176 < 288; [16, 16]: 128 <
    256; [30, 12]: 168 < 360; [12, 9]: 84 < 108; [10, 64]: 296 < 640; [1, 200] has rank 1, 402 > 200: as it is."""
    expected = 4 * 2 * (44 + 32 + 42 + 21 + 74) + 4 * (3 + 200 + 1)
    assert PowerSgd(2).nbytes((LAYOUT.size,), torch.float32, LAYOUT) == expected
    assert PowerSgd(2, min_rate=3.0).nbytes((12, 9), torch.float32, None) == 4 * 12 * 9
    assert PowerSgd(50).nbytes((30, 40), torch.float32, None) == 4 * 30 * 40


# --- names ------------------------------------------------------------------------------------------------------------
def test_parse() -> None:
    assert parse("half", "codec") == ("half", {})
    assert parse(" svd(energy=0.95, rank = 4) ", "codec") == ("svd", {"energy": 0.95, "rank": 4})
    assert parse('x(name="a, b", on=true)', "codec") == ("x", {"name": "a, b", "on": True})
    assert parse("half()", "codec") == ("half", {})


@pytest.mark.parametrize("text", ["svd(energy=0.95", "svd(energy)", "svd(energy=)", "svd(a=1)x", "svd(a=1}, b={c=2)"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(BadInput, match=r"^codec\.up\.update: .*name\(key=value, \.\.\.\)$"):
        parse(text, "codec.up.update")


def test_make() -> None:
    assert make("svd", "codec") == Svd((0.95, 0.98)) == make("svd(energy=[0.95, 0.98])", "codec")
    assert make("svd(energy=1, skip=['a', 'b'])", "codec") == Svd(1.0, skip=("a", "b"))
    assert make("quantize(bits=4)", "codec") == Quantize(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("svd(energy=1.5)", r"^codec\.energy: must be at most 1"),
        ("svd(energy=0)", r"^codec\.energy: must be greater than 0"),
        ("svd(energy=[0.95])", r"^codec\.energy: "),
        ("svd(rank=4)", r"`codec\.rank` is not a key of Svd"),
        ("quantize(bits=3)", r"^codec\.bits: must be 2, 4, 8 or 16"),
        ("topk(fraction=0)", r"^codec\.fraction: "),
        ("powersgd(rank=0)", r"^codec\.rank: must be at least 1"),
        ("svdd", r"codec: 'svdd' is not known; did you mean `svd`"),
    ],
)
def test_make_refuses(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make(text, "codec")


def test_every_name_stands_for_a_codec() -> None:
    for name in CODECS:
        codec = resolve(CODECS, name, "codec")
        for member in ("nbytes", "encode", "decode", "plain", "stateful", "scheduled"):
            assert hasattr(codec, member), (name, member)


def test_the_page_of_codecs_names_them_all_with_their_parameters() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/codecs.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ((?:`|$|\|| ).*?)\|", page, flags=re.MULTILINE))
    assert list(rows) == list(CODECS)
    for name, said in rows.items():
        shown = re.findall(r"`(\w+)` = (\[[^\]]*\]|\S+?)[,\s]", said + " ")
        real = parameters(resolve(CODECS, name, "codec"), ())
        expected = {key: json.loads(json.dumps(default)) for key, (_, default) in real.items()}
        assert {key: json.loads(value) for key, value in shown} == expected
