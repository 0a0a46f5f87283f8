"""Half precision on the wire: float32 and float64 travel as IEEE float16, everything else as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpifed.codecs.identity import from_bytes, to_bytes
from mpifed.types import Layout, State

SHORTENED = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Half:
    """Halves the bytes of float32: relative error up to 2^-11; magnitudes above 65,504 are cut to it."""

    plain: ClassVar[bool] = False

    stateful: ClassVar[bool] = False

    scheduled: ClassVar[bool] = False

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> int | None:
        """See `Codec.nbytes`."""
        return torch.Size(shape).numel() * (2 if dtype in SHORTENED else dtype.itemsize)

    def encode(
        self, value: Tensor, layout: Layout | None, memory: State, progress: float, seed: int = 0
    ) -> tuple[Tensor, State]:
        """See `Codec.encode`."""
        if value.dtype in SHORTENED:
            value = value.clamp(-65504.0, 65504.0).to(torch.float16)
        return to_bytes(value), memory

    def decode(self, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> Tensor:
        """See `Codec.decode`."""
        if dtype in SHORTENED:
            return from_bytes(data, shape, torch.float16).to(dtype)
        return from_bytes(data, shape, dtype)
