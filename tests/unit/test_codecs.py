"""Codecs: what arrives, and that it takes the bytes that were foretold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpifed.codecs import CODECS, parse
from mpifed.codecs.half import Half
from mpifed.codecs.identity import Identity, from_bytes, to_bytes
from mpifed.component import resolve
from mpifed.errors import BadInput

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
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (2, 3), (3, 0, 2), (2, 2, 2))


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(1))
    return (values % 2 == 0) if dtype == torch.bool else values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", [Identity(), Half()], ids=["identity", "half"])
def test_small_whole_numbers_survive_every_codec(codec: Any, dtype: torch.dtype) -> None:
    """Up to 99, which float16 holds exactly; and the bytes are as many as the shape foretells."""
    for shape in SHAPES:
        value = sample(shape, dtype)
        data, memory = codec.encode(value, None, {}, 0.5)
        assert data.dtype == torch.uint8 and data.dim() == 1 and memory == {}
        assert len(data) == codec.nbytes(shape, dtype, None)
        again = codec.decode(data, shape, dtype, None)
        assert again.dtype == dtype and again.shape == value.shape and torch.equal(again, value)


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


def test_every_name_stands_for_a_codec() -> None:
    for name in CODECS:
        codec = resolve(CODECS, name, "codec")
        for member in ("nbytes", "encode", "decode", "plain", "stateful"):
            assert hasattr(codec, member), (name, member)
