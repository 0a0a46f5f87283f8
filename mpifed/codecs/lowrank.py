"""Matrices as products of two thin factors, of the smallest rank that keeps a share of the energy.

With n <= N the sides of a matrix A (transposed where it is tall) and sigma_i its singular values, the energy of rank K
is sum_{i<=K} sigma_i^2 / ||A||_F^2. The Gram matrix A A^T (n x n) has the eigenvalues sigma_i^2 and, as eigenvectors,
the left singular vectors U: so neither a full singular value decomposition nor the right vectors are needed, and
U_K (U_K^T A) is the best approximation of rank K. In float32 that squares the condition, which changes singular values
below 3e-4 sigma_1 alone: the energy is exact to about 1e-6, and above a share of 0.999 float64 is used.

Of large matrices the eigenvectors cost most (n^3). Where few are enough, an adaptive randomised range finder (Halko,
Martinsson, Tropp, SIAM Review 2011, arXiv 0909.4061, Algorithms 4.2 and 4.4 by blocks) is faster: it widens a basis Q
until ||Q^T A||^2, which is the energy that it captures, suffices. The constants below say when it is tried; where it
finds that too many columns would be needed, the Gram matrix is computed after all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

EXACT_FROM = 0.999
"""Share of the energy from which Gram matrices are computed in float64."""

RANGE_FINDER_FROM = 512
"""Short side from which few ranks are looked for by the range finder first."""

RANGE_FINDER_LENGTH = 4
"""Largest N / n at which they are: in longer matrices eigenvectors are the smaller part of the work."""

RANGE_FINDER_SHARE = 1 / 8
"""Ranks, as a share of the short side, above which it is not faster."""

_BLOCK = 32  # columns by which its basis is widened
_SPARE = 8  # columns beyond the rank, without which the last directions would be poor
_SAFE = 1e-12, 1e12  # largest magnitudes between which float32's squares neither vanish nor overflow
_GRAM_BLOCK = 128


Pair: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Factors:
    """`left` `[P, K]` times `right` `[K, Q]`."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def largest_rank(rows: int, columns: int) -> int:
    """The largest K whose factors are smaller than the matrix: K (P + Q) < P Q; 0 where none are."""
    return max(0, (rows * columns - 1) // (rows + columns))


def truncated(matrices: Tensor, energy: float, floor: float = 0.0) -> list[Factors | None]:
    """`[m, P, Q]`, all of one shape -> for each its factors of the smallest rank K >= max(1, floor * n) with an energy
    above `energy`; of rank 0 where it is all zero, None where they would be no smaller than the matrix or it is not
    finite."""
    rows, columns = matrices.shape[1:]
    found: list[Factors | None] = [None] * len(matrices)
    magnitudes = matrices.abs().amax(dim=(1, 2))
    for i in (magnitudes == 0).nonzero().flatten().tolist():
        found[i] = Factors(matrices.new_empty(rows, 0), matrices.new_empty(0, columns))
    ordinary = ((magnitudes > 0) & magnitudes.isfinite()).nonzero().flatten().tolist()
    if ordinary:
        chosen = matrices if len(ordinary) == len(matrices) else matrices[ordinary]
        wide = chosen if rows <= columns else chosen.mT
        safe = bool(((magnitudes[ordinary] > _SAFE[0]) & (magnitudes[ordinary] < _SAFE[1])).all())
        if energy > EXACT_FROM or not safe:
            wide = wide.double()
        least = max(1, math.ceil(floor * wide.shape[1]))
        pairs = _factored(wide, energy, least, largest_rank(rows, columns))
        for i, pair in zip(ordinary, pairs, strict=True):
            if pair is not None:
                short, long = (factor.to(matrices.dtype) for factor in pair)
                if safe or bool(long.isfinite().all()):
                    found[i] = Factors(short, long) if rows <= columns else Factors(long.T, short.T)
    return found


def _factored(wide: Tensor, energy: float, least: int, most: int) -> list[Pair | None]:
    """Of `[m, n, N]`: U_K `[n, K]` and U_K^T A `[K, N]` for each, None where K is above `most`; the fastest way."""
    n, columns = wide.shape[1:]
    few = int(n * RANGE_FINDER_SHARE)
    long = columns > RANGE_FINDER_LENGTH * n
    if n < RANGE_FINDER_FROM or long or wide.dtype == torch.float64 or least > few:
        return _by_gram(wide, energy, least, most)
    pairs: list[Pair | None] = []
    for matrix in wide:
        pair = _by_range_finder(matrix, energy, least, min(few, most))
        pairs += _by_gram(matrix[None], energy, least, most) if pair is None else [pair]
    return pairs


def _by_gram(wide: Tensor, energy: float, least: int, most: int) -> list[Pair | None]:
    """By the eigenvectors of the Gram matrix: exact ranks."""
    try:
        values, vectors = torch.linalg.eigh(_gram(wide))  # ascending
    except torch.linalg.LinAlgError:  # not seen: then they travel as they are
        return [None] * len(wide)
    sums = values.double().clamp(min=0).flip(-1).cumsum(-1)
    ranks = (sums <= energy * sums[:, -1:]).sum(dim=-1).add(1).clamp(min=least).tolist()
    found: list[Pair | None] = []
    for matrix, basis, rank in zip(wide, vectors, ranks, strict=True):
        if rank > most:
            found.append(None)
        else:
            short = basis[:, -rank:].flip(-1)
            found.append((short, short.T @ matrix))
    return found


def _gram(wide: Tensor) -> Tensor:
    """A A^T of each `[m, n, N]`; of a large one the lower triangle alone, all that `eigh` looks at."""
    n = wide.shape[1]
    if n <= _GRAM_BLOCK:
        return wide @ wide.mT
    gram = wide.new_zeros(len(wide), n, n)
    for first in range(0, n, _GRAM_BLOCK):
        gram[:, first:, first : first + _GRAM_BLOCK] = wide[:, first:] @ wide[:, first : first + _GRAM_BLOCK].mT
    return gram


def _by_range_finder(wide: Tensor, energy: float, least: int, most: int) -> Pair | None:
    """Of one `[n, N]`, by a basis of at most `most` columns that is random but for the shape; None where they are too
    few.

    One power iteration improves each block of columns, and `_SPARE` columns beyond the rank its last directions.
    """
    n, columns = wide.shape
    generator = torch.Generator().manual_seed(n * columns)
    wanted = energy * float(wide.double().square().sum())
    basis, inside, captured = wide.new_empty(n, 0), wide.new_empty(0, columns), 0.0
    while basis.shape[1] + _BLOCK <= most:
        block = wide @ torch.randn(columns, _BLOCK, generator=generator, dtype=wide.dtype)
        block = wide @ (wide.T @ _orthonormal(block, basis))
        block = _orthonormal(block, basis)
        gained = block.T @ wide
        last = float(gained.double().square().sum())
        basis, inside, captured = torch.cat([basis, block], 1), torch.cat([inside, gained]), captured + last
        if captured > wanted:
            values, vectors = torch.linalg.eigh(inside @ inside.T)  # ascending
            sums = values.double().clamp(min=0).flip(0).cumsum(0)
            rank = max(least, int((sums <= wanted).sum()) + 1)
            if rank + _SPARE <= len(sums):
                chosen = vectors[:, -rank:].flip(1)
                return basis @ chosen, chosen.T @ inside
        elif captured + last * (most - basis.shape[1]) / _BLOCK < wanted:  # blocks to come capture less
            return None
    return None


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of the block's columns without what lies in `basis`; projected twice, as once leaves
    rounding behind."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block
