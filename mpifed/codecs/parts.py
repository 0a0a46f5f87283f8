"""The tensors inside a value, and their bytes one after another: what all codecs that work tensor by tensor share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpifed.types import Layout, State

COMPRESSED = (torch.float32, torch.float64)
"""What is compressed with loss; every other dtype travels as it is."""


@dataclass(frozen=True)
class Part:
    """One tensor inside a value: elements `[start, start + size)` of it, read as `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Of its matrix: a convolution `[out, in, h, w]` is `[out, in*h*w]`, as in PowerSGD."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) >= 2

    def of(self, flat: Tensor) -> Tensor:
        """Its elements `[size]` in the flat value, sharing memory."""
        return flat[self.start : self.start + self.size]


def parts(shape: tuple[int, ...], layout: Layout | None) -> list[Part]:
    """The tensors of a value of that shape in order: its layout's, or without one itself (named "")."""
    if layout is None:
        return [Part("", shape, 0)]
    if layout.size != math.prod(shape):
        raise ValueError(f"a value of shape {shape} does not have the {layout.size} elements of its layout")
    return [Part(*named) for named in zip(layout.names, layout.shapes, layout.offsets, strict=True)]


def cut(data: Tensor, sizes: Sequence[int], codec: str) -> tuple[Tensor, ...]:
    """`data` (uint8, one axis) in pieces of those sizes. Raises ValueError where it is longer or shorter."""
    if data.numel() != sum(sizes):
        raise ValueError(f"{codec}: {data.numel()} bytes came where {sum(sizes)} were expected; they are damaged")
    return data.split(list(sizes))


# --- error feedback ---------------------------------------------------------------------------------------------------
def compensated(value: Tensor, memory: State) -> Tensor:
    """The value and what was left out the last time, contiguous."""
    return (value + memory["residual"] if "residual" in memory else value).contiguous()


def residual(value: Tensor, decoded: Tensor) -> State:
    """The memory of error feedback: what the receiver did not get of a compensated value."""
    return {"residual": value - decoded}
