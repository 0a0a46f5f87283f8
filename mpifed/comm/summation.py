"""Sums of replies that come out the same, bit for bit, however the clients are dealt to ranks.

`add_in_order` adds in float64 in a fixed order, so all values have to be in one place. `add_exactly` needs no order: it
rounds every term to a common grid, so coarse that no partial sum of the terms needs rounding. Additions are then exact,
hence associative: each rank adds its own clients, and MPI adds the ranks in whatever order it likes.
(Pre-rounded summation, as in Demmel and Nguyen, Fast Reproducible Floating-Point Summation, ARITH 2013.)

The grid: let B be a bound on the sum of the terms' magnitudes and 2^e a power of two above it. Multiples of 2^(e-51) up
to 2^e need 52 bits, and a float64 has 53. A term is off by at most 2^-52 * 2^e <= 2^-51 B: for the terms of the largest
element that is about what float64 loses anyway, and an element a million times smaller is still as exact as float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 15
"""Elements of a sum that are worked on at a time, so that they stay in the cache from one reply to the next."""

_MARGIN = 1.0 + 2.0**-20
"""On the bound, for what rounding adds to the terms, to their products and to the bound itself."""


def add_in_order(total: Tensor, values: Iterable[Tensor], factors: Iterable[float]) -> None:
    """`total += factor * value` for one value after another, in float64 and rounded twice everywhere.

    A fused multiply-add, which rounds once, would be used or not depending on where a slice begins.
    """
    pairs = [(value.reshape(-1), factor) for value, factor in zip(values, factors, strict=True)]
    for start in range(0, total.numel(), _BLOCK):
        block = total[start : start + _BLOCK]
        for value, factor in pairs:
            # not in place: a float64 value is the reply itself
            block.add_(value[start : start + _BLOCK].to(torch.float64) * factor)


def peak(value: Tensor) -> float:
    """The largest magnitude in a tensor of floating-point numbers; NaN where it holds one, 0 where it is empty."""
    if value.numel() == 0:
        return 0.0
    least, most = (float(extreme) for extreme in torch.aminmax(value))
    return max(-least, most)


def bound(peaks: Iterable[float], factors: Iterable[float]) -> float:
    """No partial sum of `factor * value` is larger, `peaks` being those of the values; factors are not negative."""
    return sum(factor * largest for factor, largest in zip(factors, peaks, strict=True))


def add_exactly(values: Sequence[Tensor], factors: Sequence[float], elements: int, bound: float) -> Tensor:
    """The sum of `factor * value`, float64 `[elements]`; sums of the same `bound` are added up without rounding.

    `bound` is that of all values that come together in the end, not only of these here. Where it is beyond 2^1020,
    terms are not rounded, and sums depend on their order.
    """
    shift = _shift(bound)
    total = torch.zeros(elements, dtype=torch.float64)
    term = torch.empty(min(elements, _BLOCK), dtype=torch.float64)
    flat = [value.reshape(-1) for value in values]
    for start in range(0, elements, _BLOCK):
        block = total[start : start + _BLOCK]
        rounded = term[: block.numel()]
        sign = 1.0
        for value, factor in zip(flat, factors, strict=True):
            rounded.copy_(value[start : start + _BLOCK])
            if factor != 1.0:
                rounded.mul_(factor)
            rounded.add_(sign * shift)  # which rounds to the grid, whose spacing is that of float64 here
            block.add_(rounded)  # and the next term's shift is of the other sign
            sign = -sign
        if sign < 0.0:
            block.sub_(shift)
    return total


def _shift(bound: float) -> float:
    """A number next to which float64 has the spacing of the grid, and even: 1.5 * 2^52 spacings."""
    _, exponent = math.frexp(bound * _MARGIN)  # bound * margin < 2^exponent
    return math.ldexp(3.0, exponent) if math.isfinite(bound) and exponent <= 1020 else 0.0
