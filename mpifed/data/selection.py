"""Some classes of a data set, as one of its own: the letters a to f, six of CIFAR-100's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mpifed.data.source import Source, Split, shared
from mpifed.errors import BadInput


class Selected:
    """A source of those classes alone, numbered anew from 0 in the order given; mean and deviation stay the whole's.

    Raises `BadInput` for a class that is named twice, or that has no sample in both parts.
    """

    def __init__(self, source: Source, classes: Sequence[int]) -> None:
        new = np.full(source.spec.classes, -1, dtype=np.int64)
        for number, label in enumerate(classes):
            if label >= source.spec.classes or new[label] >= 0:
                raise BadInput(
                    f"data.only_classes: {list(classes)} must name classes below {source.spec.classes}, each once"
                )
            new[label] = number
        self._source = source
        self.shared = shared(source)
        self._rows = {
            "train": np.flatnonzero(new[source.train_labels] >= 0),
            "test": np.flatnonzero(new[source.test_labels] >= 0),
        }
        self._labels = {
            "train": new[source.train_labels[self._rows["train"]]],
            "test": new[source.test_labels[self._rows["test"]]],
        }
        for part, labels in self._labels.items():
            missing = set(range(len(classes))) - set(labels.tolist())
            if missing:
                raise BadInput(f"data.only_classes: the {part} set has no sample of class {classes[min(missing)]}")
        self.spec = replace(source.spec, classes=len(classes))
        self.train_labels, self.test_labels = self._labels["train"], self._labels["test"]
        owner = source.train_owner
        self.train_owner = None if owner is None else owner[self._rows["train"]]

    def take(self, split: Split, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `Source.take`."""
        x, _ = self._source.take(split, self._rows[split][indices])
        return x, torch.from_numpy(self._labels[split][indices])
