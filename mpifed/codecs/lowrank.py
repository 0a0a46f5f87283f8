"""Matrices as products of two thin factors, of the smallest rank that keeps a share of the energy.

With n <= N the sides of a matrix A (transposed where it is tall) and sigma_i its singular values, the energy of rank K
is sum_{i<=K} sigma_i^2 / ||A||_F^2. The Gram matrix A A^T (n x n) has the eigenvalues sigma_i^2 and, as eigenvectors,
the left singular vectors U: so neither a full singular value decomposition nor the right vectors are needed, and
U_K (U_K^T A) is the best approximation of rank K. In float32 that squares the condition, which changes singular values
below 3e-4 sigma_1 alone: the energy is exact to about 1e-6, and above a share of 0.999 float64 is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_FROM = 0.999
"""Share of the energy from which Gram matrices are computed in float64."""

_SAFE = 1e-12, 1e12  # largest magnitudes between which float32's squares neither vanish nor overflow
_GRAM_BLOCK = 128


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
        for i, pair in zip(ordinary, _by_gram(wide, energy, least, largest_rank(rows, columns)), strict=True):
            if pair is not None:
                short, long = (factor.to(matrices.dtype) for factor in pair)
                if safe or bool(long.isfinite().all()):
                    found[i] = Factors(short, long) if rows <= columns else Factors(long.T, short.T)
    return found


def _by_gram(wide: Tensor, energy: float, least: int, most: int) -> list[tuple[Tensor, Tensor] | None]:
    """Of `[m, n, N]`: U_K `[n, K]` and U_K^T A `[K, N]` for each, None where K is above `most`."""
    try:
        values, vectors = torch.linalg.eigh(_gram(wide))  # ascending
    except torch.linalg.LinAlgError:  # not seen: then they travel as they are
        return [None] * len(wide)
    sums = values.double().clamp(min=0).flip(-1).cumsum(-1)
    ranks = (sums <= energy * sums[:, -1:]).sum(dim=-1).add(1).clamp(min=least).tolist()
    found: list[tuple[Tensor, Tensor] | None] = []
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
