"""The trivial codec: a tensor's own bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpifed.types import Layout, State


def to_bytes(value: Tensor) -> Tensor:
    """The memory of a contiguous copy of `value` (or of itself) as uint8, one axis."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def from_bytes(data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """uint8 -> tensor; shares memory with `data` where its alignment allows."""
    if data.numel() == 0:  # an empty slice may have strides that cannot be viewed
        return torch.empty(shape, dtype=dtype)
    if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(shape)


@dataclass(frozen=True)
class Identity:
    """Sends a tensor as it is."""

    plain: ClassVar[bool] = True

    stateful: ClassVar[bool] = False

    scheduled: ClassVar[bool] = False

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> int | None:
        """See `Codec.nbytes`."""
        return torch.Size(shape).numel() * dtype.itemsize

    def encode(
        self, value: Tensor, layout: Layout | None, memory: State, progress: float, seed: int = 0
    ) -> tuple[Tensor, State]:
        """See `Codec.encode`."""
        return to_bytes(value), memory

    def decode(self, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> Tensor:
        """See `Codec.decode`."""
        return from_bytes(data, shape, dtype)
