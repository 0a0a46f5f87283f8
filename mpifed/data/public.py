"""The public data set of a job: labelled samples that the server and every client have, beside the private ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mpifed.data.source import ArraySource, Source, Split, part, shared


class Public:
    """`PublicSet` (see `mpifed.algorithms.base`): some training samples of a source, taken when they are asked for.

    Its pixels are standardised by its own mean and deviation.
    """

    def __init__(self, source: Source, indices: np.ndarray, device: torch.device) -> None:
        self._source = source
        self._indices = indices
        self._device = device
        self.labels = torch.from_numpy(source.train_labels[indices].astype(np.int64))
        self.classes = source.spec.classes

    def __len__(self) -> int:
        return len(self._indices)

    def x(self, indices: Tensor) -> Tensor:
        """Samples `indices` (int64 `[k]`) as model input `[k, *input_shape]` on the device."""
        if self.at_hand:
            stored, _ = self._source.take("train", self._indices[indices.cpu().numpy()])
        else:
            stored = self._stored[indices.cpu()]
        return self._source.spec.standardise(stored.to(self._device))

    @property
    def at_hand(self) -> bool:
        """The source is in memory, so that no copy need be kept of what is taken out of it."""
        return shared(self._source) or isinstance(self._source, ArraySource)

    def share(self, load: Callable[[Callable[[], Source]], Source]) -> None:
        """Keep them in one copy a node, by `load`, which every rank calls."""
        self._source = load(lambda: part(self._source, "train", self._indices))
        self._indices = np.arange(len(self._indices))

    @cached_property
    def _stored(self) -> Tensor:
        """All of them as stored, kept once a rank."""
        return self._source.take("train", self._indices)[0]


class Rest:
    """A source without the training samples that were held out to be public."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source = source
        self.shared = shared(source)
        self._indices = indices
        self.spec = source.spec
        self.train_labels = source.train_labels[indices]
        self.test_labels = source.test_labels
        self.train_owner = None if source.train_owner is None else source.train_owner[indices]

    def take(self, split: Split, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `Source.take`."""
        return self._source.take(split, self._indices[indices] if split == "train" else indices)


class Relabelled:
    """A source whose labels begin at `offset`: the private classes after the public ones, for one common output."""

    def __init__(self, source: Source, offset: int) -> None:
        self._source = source
        self.shared = shared(source)
        self.spec = replace(source.spec, classes=offset + source.spec.classes)
        self.train_labels = source.train_labels + offset
        self.test_labels = source.test_labels + offset
        self.train_owner = source.train_owner
        self._offset = offset

    def take(self, split: Split, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `Source.take`."""
        x, y = self._source.take(split, indices)
        return x, y + self._offset
