"""Gaussian class clusters of any size and shape: for benchmarks and for trying things out, with no file at all."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mpifed.data.source import Split
from mpifed.errors import BadInput
from mpifed.types import DataSpec

SEPARATION = 6.0
"""Length of a class's centre, in standard deviations of the noise: two centres are then about 8.5 apart."""


class Synthetic:
    """Sample = centre of its class (a random direction of length `SEPARATION`) + standard normal noise; float32.

    A sample is a function of (seed, split, index), made when it is taken: nothing but labels is held, and a rank makes
    no more than its own. Classes are equally frequent, up to one sample.
    """

    def __init__(
        self,
        *,
        samples: Annotated[int, Field(ge=1)] = 10_000,
        test_samples: Annotated[int, Field(ge=1)] = 2_000,
        input_shape: tuple[Annotated[int, Field(ge=1)], ...] = (1, 28, 28),
        classes: Annotated[int, Field(ge=2)] = 10,
        seed: Annotated[int, Field(ge=0, lt=2**63)] = 0,
    ) -> None:
        if not input_shape:
            raise BadInput("data.input_shape is empty; give the shape of one sample, such as [1, 28, 28]")
        self.spec = DataSpec(tuple(input_shape), classes)
        self.train_owner: np.ndarray | None = None
        self._seed = seed
        rng = np.random.Generator(np.random.Philox(key=[seed, 2]))
        centres = rng.standard_normal((classes, *input_shape), dtype=np.float32)
        lengths = np.sqrt((centres.reshape(classes, -1) ** 2).sum(axis=1)).reshape(-1, *(1,) * len(input_shape))
        self._centres = centres * (SEPARATION / lengths)
        self.train_labels = rng.permutation(np.arange(samples, dtype=np.int64) % classes)
        self.test_labels = rng.permutation(np.arange(test_samples, dtype=np.int64) % classes)

    def take(self, split: Split, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `Source.take`; float32."""
        train = split == "train"
        labels = (self.train_labels if train else self.test_labels)[indices]
        samples = self._centres[labels]
        for row, index in zip(samples, np.asarray(indices).tolist(), strict=True):
            # One counter-based stream per sample: any subset costs what it holds, and is the same on every rank.
            noise = np.random.Generator(np.random.Philox(key=[self._seed, 0 if train else 1], counter=[0, 0, 0, index]))
            row += noise.standard_normal(row.shape, dtype=np.float32)
        return torch.from_numpy(samples), torch.from_numpy(labels)
