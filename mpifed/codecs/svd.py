"""Truncated singular value decomposition, matrix by matrix: the compression of FedKD.

Wu, Wu, Lyu, Huang, Xie: Communication-efficient federated learning via knowledge distillation, Nature Communications
2022, arXiv 2108.13323. A matrix A of P x Q is sent as two factors of the smallest rank K whose energy
sum_{i<=K} sigma_i^2 / sum_i sigma_i^2 is above T, and T rises over the run: T = start + (end - start) * round / rounds
(as in the authors' code; rounds from 1, so that T is `end` in the last one and never quite `start`).

Departures from that code: the factors are U_K and U_K^T A, with no singular values beside them; a convolution is a
matrix [out, in*h*w]; a matrix travels as it is where its factors would be no smaller; the rank is never zero and may be
full (their loop cannot return the full rank, and drops such updates); what arrives is told apart by a tag, not by the
length of a list. `docs/codecs.md` has the bytes, and how fast ranks are found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field as Range
from torch import Tensor

from mpifed.codecs.identity import from_bytes, to_bytes
from mpifed.codecs.lowrank import Factors, largest_rank, truncated
from mpifed.codecs.parts import COMPRESSED, Part, compensated, cut, parts, residual
from mpifed.types import Layout, State

Share = Annotated[float, Range(gt=0, le=1)]

DENSE = -1
"""The tag of a matrix that travels as it is; every other tag is the rank of its factors (0: all zero)."""


@dataclass(frozen=True)
class Svd:
    """int32 tags of all matrices; then, tensor after tensor, factors `[P, K]` and `[K, Q]`, or the tensor itself."""

    plain: ClassVar[bool] = False

    energy: Share | tuple[Share, Share] = (0.95, 0.98)
    """T: a constant, or its value before the first round and in the last one; 1 sends everything as it is."""
    floor: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Least rank, as a share of the full rank."""
    smallest: Annotated[int, Range(ge=0)] = 0
    """Tensors with fewer entries travel as they are."""
    skip: tuple[str, ...] = ()
    """Tensors with one of these in their names travel as they are, for example `["embedding"]`."""
    feedback: bool = False
    """What an approximation leaves out is kept, and added to the next value (not part of FedKD)."""

    @property
    def stateful(self) -> bool:
        return self.feedback

    @property
    def scheduled(self) -> bool:
        return isinstance(self.energy, tuple)

    def threshold(self, progress: float) -> float:
        """T at that share of the run."""
        if isinstance(self.energy, tuple):
            start, end = self.energy
            return start + (end - start) * progress
        return self.energy

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> int | None:
        """None where there are matrices: the values decide about ranks."""
        return None if self._matrices(shape, dtype, layout) else math.prod(shape) * dtype.itemsize

    def bounds(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> tuple[int, int]:
        """Least and most encoded bytes: all matrices zero, so that tags are left of them, and all as they are."""
        matrices = self._matrices(shape, dtype, layout)
        tags, others = 4 * len(matrices), math.prod(shape) - sum(part.size for part in matrices)
        return tags + others * dtype.itemsize, tags + math.prod(shape) * dtype.itemsize

    def encode(
        self, value: Tensor, layout: Layout | None, memory: State, progress: float, seed: int = 0
    ) -> tuple[Tensor, State]:
        """See `Codec.encode`."""
        shape, dtype = tuple(value.shape), value.dtype
        matrices = self._matrices(shape, dtype, layout)
        if not matrices:
            return to_bytes(value), {}
        value = compensated(value, memory)
        flat = value.view(-1)
        factors = self._factors(flat, matrices, self.threshold(progress))
        tags, pieces = [], []
        for part in parts(shape, layout):
            pair = factors.get(part.start) if part in matrices else None
            if part in matrices:
                tags.append(DENSE if pair is None else pair.rank)
            pieces += [part.of(flat)] if pair is None else [pair.left, pair.right]
        head = torch.tensor(tags, dtype=torch.int32)
        data = torch.cat([to_bytes(piece) for piece in (head, *pieces)])
        return data, residual(value, self.decode(data, shape, dtype, layout)) if self.feedback else {}

    def decode(self, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> Tensor:
        """See `Codec.decode`. Raises ValueError where the bytes are not those of such a value."""
        tensors, matrices = parts(shape, layout), self._matrices(shape, dtype, layout)
        tags = dict(zip(matrices, self.tags(data, shape, dtype, layout), strict=True))
        sizes = [_elements(part, tags.get(part, DENSE)) * dtype.itemsize for part in tensors]
        _, *pieces = cut(data, [4 * len(matrices), *sizes], "svd")
        value = torch.empty(math.prod(shape), dtype=dtype)
        for part, piece in zip(tensors, pieces, strict=True):
            rank = tags.get(part, DENSE)
            numbers = from_bytes(piece, (piece.numel() // dtype.itemsize,), dtype)
            if rank != DENSE:
                # a copy, because the same factors have the same product only at the same alignment
                left, right = numbers.clone().split([part.rows * rank, rank * part.columns])
                numbers = (left.view(-1, rank) @ right.view(rank, -1)).view(-1) if rank else torch.zeros(part.size)
            part.of(value).copy_(numbers)
        return value.view(shape)

    def tags(self, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> list[int]:
        """The rank of every matrix in encoded bytes, or `DENSE`. Raises ValueError where a tag cannot be one."""
        matrices = self._matrices(shape, dtype, layout)
        if data.numel() < 4 * len(matrices):
            raise ValueError(f"svd: {data.numel()} bytes came, not even {len(matrices)} tags; they are damaged")
        tags: list[int] = from_bytes(data[: 4 * len(matrices)], (len(matrices),), torch.int32).tolist()
        for part, tag in zip(matrices, tags, strict=True):
            if not DENSE <= tag <= largest_rank(part.rows, part.columns):
                raise ValueError(f"svd: {tag} is no rank of a matrix of {part.rows} x {part.columns}; it is damaged")
        return tags

    def _matrices(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> list[Part]:
        """The tensors that may travel as factors."""
        return [
            part
            for part in parts(shape, layout)
            if dtype in COMPRESSED and part.is_matrix and largest_rank(part.rows, part.columns) > 0
            if part.size >= self.smallest and not any(word in part.name for word in self.skip)
        ]

    def _factors(self, flat: Tensor, matrices: list[Part], threshold: float) -> Mapping[int, Factors | None]:
        """Of each matrix by its start in the flat value; those of one shape are worked on together."""
        alike: dict[tuple[int, int], list[Part]] = {}
        for part in matrices:
            alike.setdefault((part.rows, part.columns), []).append(part)
        found: dict[int, Factors | None] = {}
        for (rows, columns), group in alike.items():
            stack = torch.stack([part.of(flat) for part in group]).view(-1, rows, columns)
            starts = [part.start for part in group]
            found.update(zip(starts, truncated(stack, threshold, self.floor), strict=True))
        return found


def _elements(part: Part, tag: int) -> int:
    """Numbers that a tensor takes with that tag."""
    return part.size if tag == DENSE else (part.rows + part.columns) * tag
