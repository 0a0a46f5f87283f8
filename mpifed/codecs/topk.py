"""Top-k: the entries of largest magnitude, each with its place; what is left out is sent later (error feedback).

Aji, Heafield: Sparse Communication for Distributed Gradient Descent, EMNLP 2017, arXiv 1704.05021; the memory as in
Stich, Cordonnier, Jaggi: Sparsified SGD with Memory, NeurIPS 2018, arXiv 1809.07599. The k largest are chosen over the
whole value, not tensor by tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field as Range
from torch import Tensor

from mpifed.codecs.identity import from_bytes, to_bytes
from mpifed.codecs.parts import COMPRESSED, compensated, cut, residual
from mpifed.types import Layout, State


@dataclass(frozen=True)
class TopK:
    """k = fraction * n entries (rounded half up, at least one) as int32 places and values; all n where that is less."""

    plain: ClassVar[bool] = False
    scheduled: ClassVar[bool] = False

    fraction: Annotated[float, Range(gt=0, le=1)] = 0.01
    """Share of the entries that is sent."""
    feedback: bool = True
    """Entries that are left out are kept, and added to the next value."""

    @property
    def stateful(self) -> bool:
        return self.feedback

    def kept(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """How many entries travel with their place; the number of entries where all travel, without places."""
        n = math.prod(shape)
        k = min(n, max(1, int(self.fraction * n + 0.5)))
        return k if dtype in COMPRESSED and k * (4 + dtype.itemsize) < n * dtype.itemsize else n

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> int | None:
        """See `Codec.nbytes`."""
        n, k = math.prod(shape), self.kept(shape, dtype)
        return n * dtype.itemsize if k == n else k * (4 + dtype.itemsize)

    def encode(
        self, value: Tensor, layout: Layout | None, memory: State, progress: float, seed: int = 0
    ) -> tuple[Tensor, State]:
        """See `Codec.encode`."""
        shape, dtype = tuple(value.shape), value.dtype
        k = self.kept(shape, dtype)
        if k == value.numel():
            return to_bytes(value), {}
        value = compensated(value, memory)
        flat = value.view(-1)
        if flat.numel() > 2**31:
            raise ValueError(f"topk: int32 places cannot tell {flat.numel()} entries apart")
        places = flat.abs().topk(k, sorted=False).indices.sort().values
        data = torch.cat([to_bytes(places.to(torch.int32)), to_bytes(flat[places])])
        return data, residual(value, self.decode(data, shape, dtype, layout)) if self.feedback else {}

    def decode(self, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> Tensor:
        """See `Codec.decode`. Raises ValueError where the bytes are not those of such a value."""
        n, k = math.prod(shape), self.kept(shape, dtype)
        if k == n:
            return from_bytes(cut(data, [n * dtype.itemsize], "topk")[0], shape, dtype)
        first, second = cut(data, [4 * k, k * dtype.itemsize], "topk")
        places = from_bytes(first, (k,), torch.int32).to(torch.int64)
        if places[0] < 0 or places[-1] >= n or not bool((places[1:] > places[:-1]).all()):
            raise ValueError(f"topk: the places are not {k} ascending ones below {n}; the bytes are damaged")
        value = torch.zeros(n, dtype=dtype)
        value[places] = from_bytes(second, (k,), dtype)
        return value.view(shape)
