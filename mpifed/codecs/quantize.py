"""Unbiased stochastic quantisation: FedPAQ's, which is QSGD.

Reisizadeh, Mokhtari, Hassani, Jadbabaie, Pedarsani: FedPAQ: A Communication-Efficient Federated Learning Method with
Periodic Averaging and Quantization, AISTATS 2020, arXiv 1909.13014, Example 1; Alistarh, Grubic, Li, Tomioka,
Vojnovic: QSGD, NeurIPS 2017, arXiv 1610.02132. An entry x of a tensor with norm ||x|| becomes sign(x) * ||x|| * l / s,
l being one of the two whole numbers beside s |x| / ||x||, drawn so that the mean is x. Sign and level are packed to
`bits` bits (no Elias code); one norm a tensor travels with them.

The draws come from the seed that the codec is given, a function of the run's seed, round, client and field: clients
round independently, and a resumed run repeats them on any number of ranks, with nothing remembered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mpifed.codecs.identity import from_bytes, to_bytes
from mpifed.codecs.parts import COMPRESSED, cut, parts
from mpifed.types import Layout, State


@dataclass(frozen=True)
class Quantize:
    """`bits` bits an entry: one for the sign, the others for s = 2^(bits - 1) - 1 levels above zero."""

    plain: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    scheduled: ClassVar[bool] = False

    bits: Literal[2, 4, 8, 16] = 8
    """Bits an entry."""
    norm: Literal["l2", "max"] = "l2"
    """What entries are measured against: the Euclidean norm of their tensor (both papers), or its largest magnitude,
    which is closer (in a tensor of n entries by up to sqrt(n)), and also unbiased."""

    @property
    def levels(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> int | None:
        """See `Codec.nbytes`."""
        if dtype not in COMPRESSED:
            return math.prod(shape) * dtype.itemsize
        return sum(self._sizes(shape, dtype, layout))

    def encode(
        self, value: Tensor, layout: Layout | None, memory: State, progress: float, seed: int = 0
    ) -> tuple[Tensor, State]:
        """See `Codec.encode`."""
        if value.dtype not in COMPRESSED:
            return to_bytes(value), {}
        generator = torch.Generator().manual_seed(seed)
        flat = value.detach().reshape(-1)
        norms, codes = [], []
        for part in parts(tuple(value.shape), layout):
            entries = part.of(flat)
            norm = self._norm(entries)
            share = entries.abs() / (norm if norm != 0 else 1)
            drawn = torch.rand(part.size, generator=generator, dtype=value.dtype)
            level = share.mul_(self.levels).add_(drawn).floor_().clamp_(max=self.levels).to(torch.int32)
            norms.append(norm.view(1))
            codes.append(_packed(level + torch.signbit(entries) * (self.levels + 1), self.bits))
        return torch.cat([to_bytes(torch.cat(norms)), *codes]), {}

    def decode(self, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> Tensor:
        """See `Codec.decode`. Raises ValueError where there are more or fewer bytes than such a value has."""
        if dtype not in COMPRESSED:
            return from_bytes(cut(data, [math.prod(shape) * dtype.itemsize], "quantize")[0], shape, dtype)
        head, *codes = cut(data, self._sizes(shape, dtype, layout), "quantize")
        norms = from_bytes(head, (len(codes),), dtype)
        value = torch.empty(math.prod(shape), dtype=dtype)
        for part, packed, norm in zip(parts(shape, layout), codes, norms, strict=True):
            code = _unpacked(packed, part.size, self.bits)
            level = (code & self.levels).to(dtype)
            sign = 1 - 2 * (code > self.levels).to(dtype)
            part.of(value).copy_(sign * level / self.levels * norm)
        return value.view(shape)

    def _sizes(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> list[int]:
        """Bytes of the norms, and of each tensor's codes, which begin at a whole byte."""
        tensors = parts(shape, layout)
        return [len(tensors) * dtype.itemsize, *(-(-part.size * self.bits // 8) for part in tensors)]

    def _norm(self, entries: Tensor) -> Tensor:
        """0-d, in the entries' dtype, finite where they are."""
        if entries.numel() == 0:
            return torch.zeros((), dtype=entries.dtype)
        if self.norm == "max":
            return entries.abs().max()
        exact = torch.linalg.vector_norm(entries, dtype=torch.float64)
        if exact.isfinite():
            exact = exact.clamp(max=torch.finfo(entries.dtype).max)
        return exact.to(entries.dtype)


def _packed(code: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits `[n]` -> uint8 `[ceil(n * bits / 8)]`, the first in the lowest bits."""
    if bits == 16:
        return to_bytes(code.to(torch.int16))  # the two's complement of what is beyond
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(code, (0, -len(code) % per_byte)).view(-1, per_byte)
    packed = torch.zeros(len(padded), dtype=torch.int32)
    for place in range(per_byte):
        packed += padded[:, place] << (place * bits)
    return packed.to(torch.uint8)


def _unpacked(packed: Tensor, n: int, bits: int) -> Tensor:
    """The other way: int32 `[n]`."""
    if bits == 16:
        return from_bytes(packed, (n,), torch.int16).to(torch.int32) & 0xFFFF
    numbers = packed.to(torch.int32)
    places = [(numbers >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(places, dim=1).view(-1)[:n]
