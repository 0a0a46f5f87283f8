"""Exact sums: any grouping and any order give the same bits, and these are close to the true sum."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from mpifed.comm.summation import add_exactly, add_in_order, bound, peak

ELEMENTS = 70_001  # more than two blocks, and not a whole number of them


def replies(count: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> tuple[list[Tensor], list[float]]:
    """Values of magnitudes e^(+-spread) and more, and weights that are no powers of two."""
    generator = torch.Generator().manual_seed(count)
    values = [
        (torch.randn(ELEMENTS, generator=generator) * (spread * torch.randn(ELEMENTS, generator=generator)).exp()).to(
            dtype
        )
        for _ in range(count)
    ]
    return values, [client + 0.1 for client in range(count)]


def in_groups(values: list[Tensor], factors: list[float], groups: list[list[int]]) -> Tensor:
    """Each group's sum, and then these from the last to the first, as MPI may."""
    limit = bound([peak(value) for value in values], factors)
    parts = [add_exactly([values[i] for i in g], [factors[i] for i in g], ELEMENTS, limit) for g in groups]
    total = parts[-1].clone()
    for part in parts[-2::-1]:
        total += part
    return total


GROUPS = [[[0, 1, 2, 3, 4, 5, 6]], [[6, 2, 4], [], [0, 5], [3, 1]], [[i] for i in (3, 0, 6, 1, 5, 2, 4)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_grouping_and_any_order_give_the_same_bits(dtype: torch.dtype) -> None:
    values, factors = replies(7, dtype, spread=1.0 if dtype == torch.float16 else 3.0)
    one, *others = (in_groups(values, factors, groups) for groups in GROUPS)
    for other in others:
        assert torch.equal(one.view(torch.int64), other.view(torch.int64))


def test_plain_float64_does_depend_on_the_order() -> None:
    """Else the test above could not fail."""
    values, factors = replies(7)
    sums = []
    for order in (range(7), reversed(range(7))):
        total = torch.zeros(ELEMENTS, dtype=torch.float64)
        order = list(order)
        add_in_order(total, [values[i] for i in order], [factors[i] for i in order])
        sums.append(total)
    assert not torch.equal(*sums)


def test_terms_are_rounded_to_the_grid() -> None:
    """A bound of 1 is below 2^1, so the grid is 2^(1-51) = 2^-50 =: g. By hand, in units of g, halves to even:

    0.25 -> 0, 0.5 -> 0, 0.75 -> 1, 1.5 -> 2, 2.5 -> 2, -0.5 -> 0, -1.5 -> -2, 3 -> 3. Twice each, as the first of two
    replies is shifted up and the second one down.
    """
    units = torch.tensor([0.25, 0.5, 0.75, 1.5, 2.5, -0.5, -1.5, 3.0])
    value, g = units * 2.0**-50, 2.0**-50
    expected = torch.tensor([0, 0, 1, 2, 2, 0, -2, 3], dtype=torch.float64)
    assert torch.equal(add_exactly([value], [1.0], 8, 1.0) / g, expected)
    assert torch.equal(add_exactly([value, value], [1.0, 1.0], 8, 1.0) / g, 2 * expected)
    assert torch.equal(add_exactly([torch.zeros(8), value], [1.0, 1.0], 8, 1.0) / g, expected)


def test_as_close_to_the_true_sum_as_is_promised() -> None:
    """Each of the seven terms is off by at most 2^-51 of the bound (and by its product's rounding, 2^-53 of itself)."""
    values, factors = replies(7)
    limit = bound([peak(value) for value in values], factors)
    total = add_exactly(values, factors, ELEMENTS, limit)
    for element in range(0, ELEMENTS, 97):
        true = sum(Fraction(f) * Fraction(float(v[element])) for f, v in zip(factors, values, strict=True))
        assert abs(Fraction(float(total[element])) - true) <= 7 * Fraction(limit) * Fraction(2) ** -51


def test_whole_numbers_are_added_exactly() -> None:
    """Sums below 2^50, of whole numbers: the grid is finer than 1."""
    values = [torch.full((5,), float(2**24 - 1 - i)) for i in range(3)]
    total = add_exactly(values, [2.0**20, 7.0, 1.0], 5, bound([peak(v) for v in values], [2.0**20, 7.0, 1.0]))
    assert total.tolist() == [(2**24 - 1) * 2**20 + (2**24 - 2) * 7 + 2**24 - 3] * 5


def test_one_reply_comes_back_as_it_is() -> None:
    """Divided by its weight and rounded to float32, down to 2^-24 of its largest element."""
    value = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0))
    value[value.abs() < peak(value) * 2**-24] = 0.0
    total = add_exactly([value], [60.0], ELEMENTS, bound([peak(value)], [60.0]))
    assert torch.equal((total / 60.0).float(), value)


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-120, 2.0**120])
def test_the_smallest_and_the_largest_numbers(scale: float) -> None:
    values = [torch.tensor([3.0, -1.0, 0.0]) * scale, torch.tensor([1.0, 1.0, 0.0]) * scale]
    total = add_exactly(values, [1.0, 2.0], 3, bound([peak(value) for value in values], [1.0, 2.0]))
    assert total.tolist() == [5 * scale, scale, 0.0]


def test_weights_may_make_any_float64() -> None:
    """A bound of 2^-1074 or 2^1024 has no grid: nothing to round in the one, only infinity to expect of the other."""
    value = torch.ones(2)
    assert add_exactly([value], [5e-324], 2, bound([1.0], [5e-324])).tolist() == [5e-324] * 2
    assert add_exactly([value], [2.0**1023], 2, bound([1.0], [2.0**1023])).tolist() == [2.0**1023] * 2
    assert add_exactly([value] * 2, [2.0**1023] * 2, 2, bound([1.0] * 2, [2.0**1023] * 2)).tolist() == [math.inf] * 2


def test_no_reply_and_no_element() -> None:
    assert add_exactly([], [], 3, 1.0).tolist() == [0.0] * 3
    assert add_exactly([torch.zeros(0)], [1.0], 0, 0.0).numel() == 0
    zero = add_exactly([-torch.zeros(2), -torch.zeros(2)], [1.0, 1.0], 2, 0.0)
    assert np.signbit(zero.numpy()).tolist() == [False, False]


def test_peak() -> None:
    assert peak(torch.tensor([1.0, -3.0, 2.0])) == 3.0
    assert peak(torch.tensor([-1.0, 4.0], dtype=torch.bfloat16)) == 4.0
    assert peak(torch.tensor(-0.5)) == 0.5
    assert peak(torch.zeros(0)) == 0.0
    assert math.isnan(peak(torch.tensor([1.0, math.nan, 2.0])))
    assert peak(torch.tensor([1.0, -math.inf])) == math.inf


def test_bound() -> None:
    """3 * 2 + 0.5 * 4 + 0 * 7."""
    assert bound([3.0, 0.5, 0.0], [2.0, 4.0, 7.0]) == 8.0
    assert bound([], []) == 0.0
