"""PowerSGD's low-rank compression, for clients that do not always take part.

Vogels, Karimireddy, Jaggi: PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization, NeurIPS
2019, arXiv 1905.13727, Algorithm 1. A matrix M (a convolution as [out, in*h*w]) is sent as P = orthonormal(M Q) and
Q = M^T P of rank r, one step of a power iteration that begins from the last Q and so closes in over the rounds.

Departures: in the paper all workers of a step share P and Q through two all-reduces. That needs the same workers in
every step; here every client has P and Q of its own, keeps its Q (`warm_start`) and, as in the authors' later package,
the residual of its own approximation (`feedback`). And P Q^T is summed at the server, so compression is not linear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field as Range
from torch import Tensor

from mpifed.codecs.identity import from_bytes, to_bytes
from mpifed.codecs.parts import COMPRESSED, Part, compensated, cut, parts, residual
from mpifed.types import Layout, State


@dataclass(frozen=True)
class PowerSgd:
    """r (n + m) numbers for an n x m matrix where r (n + m) min_rate < n m; everything else as it is."""

    plain: ClassVar[bool] = False
    scheduled: ClassVar[bool] = False

    rank: Annotated[int, Range(ge=1)] = 2
    """r; of smaller matrices their own rank."""
    min_rate: Annotated[float, Range(ge=1)] = 2.0
    """A matrix is compressed where that saves more than this factor."""
    warm_start: bool = True
    """Begin from the last round's Q; else from the same random one every time."""
    feedback: bool = True
    """What an approximation leaves out is kept, and added to the next value."""

    @property
    def stateful(self) -> bool:
        return self.feedback or self.warm_start

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> int | None:
        """See `Codec.nbytes`."""
        return sum(self._sizes(shape, dtype, layout))

    def encode(
        self, value: Tensor, layout: Layout | None, memory: State, progress: float, seed: int = 0
    ) -> tuple[Tensor, State]:
        """See `Codec.encode`."""
        shape, dtype = tuple(value.shape), value.dtype
        if not self._compresses(shape, dtype, layout):
            return to_bytes(value), {}
        value = compensated(value, memory)
        flat = value.view(-1)
        starts = self._starts(shape, dtype, layout, memory)
        pieces, ends = [], []
        for part in parts(shape, layout):
            rank = self._rank(part, dtype)
            if rank == 0:
                pieces.append(part.of(flat))
                continue
            matrix = part.of(flat).clone().view(part.rows, part.columns)
            left = torch.linalg.qr(matrix @ starts.pop(0)).Q
            right = matrix.T @ left
            pieces += [left, right]
            ends.append(right.reshape(-1))
        data = torch.cat([to_bytes(piece) for piece in pieces])
        kept: State = {"start": torch.cat(ends)} if self.warm_start else {}
        if self.feedback:
            kept |= residual(value, self.decode(data, shape, dtype, layout))
        return data, kept

    def decode(self, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> Tensor:
        """See `Codec.decode`. Raises ValueError where there are more or fewer bytes than such a value has."""
        value = torch.empty(math.prod(shape), dtype=dtype)
        pieces = cut(data, self._sizes(shape, dtype, layout), "powersgd")
        for part, piece in zip(parts(shape, layout), pieces, strict=True):
            rank = self._rank(part, dtype)
            numbers = from_bytes(piece, (piece.numel() // dtype.itemsize,), dtype)
            if rank:
                left, right = numbers.clone().split([part.rows * rank, part.columns * rank])
                numbers = (left.view(-1, rank) @ right.view(-1, rank).T).view(-1)
            part.of(value).copy_(numbers)
        return value.view(shape)

    def _rank(self, part: Part, dtype: torch.dtype) -> int:
        """Of the factors of a tensor; 0 where it travels as it is."""
        if dtype not in COMPRESSED or not part.is_matrix or part.size == 0:
            return 0
        rank = min(self.rank, part.rows, part.columns)
        return rank if (part.rows + part.columns) * rank * self.min_rate < part.size else 0

    def _compresses(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> bool:
        return any(self._rank(part, dtype) for part in parts(shape, layout))

    def _sizes(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> list[int]:
        """Bytes of each tensor."""
        return [
            ((part.rows + part.columns) * rank if rank else part.size) * dtype.itemsize
            for part in parts(shape, layout)
            for rank in [self._rank(part, dtype)]
        ]

    def _starts(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None, memory: State) -> list[Tensor]:
        """The Q `[columns, rank]` of each compressed matrix to begin from: the last one, or a random one."""
        ranks = [(part.columns, rank) for part in parts(shape, layout) if (rank := self._rank(part, dtype))]
        sizes = [columns * rank for columns, rank in ranks]
        generator = torch.Generator().manual_seed(0)
        last = memory.get("start")
        whole = torch.randn(sum(sizes), generator=generator, dtype=dtype) if last is None else last
        return [start.clone().view(size) for start, size in zip(whole.split(sizes), ranks, strict=True)]
