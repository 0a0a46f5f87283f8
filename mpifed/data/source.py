"""What a data set is to the rest of the program, and what the file-based ones share."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mpifed.errors import BadInput
from mpifed.types import DataSpec

Split: TypeAlias = Literal["train", "test"]


class Source(Protocol):
    """A labelled data set with a training and a test part.

    It is made on every rank, so it should hold little: labels in memory, samples only when `take` asks for them.
    """

    spec: DataSpec
    train_labels: np.ndarray  # int64 [train samples], in [0, spec.classes)
    test_labels: np.ndarray  # int64 [test samples]
    train_owner: np.ndarray | None  # int64 [train samples]: who a sample came from (a writer, a hospital), if known

    def take(self, split: Split, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Copies of those samples as stored, `[k, *input_shape]`, and their int64 labels `[k]`.

        They are uint8 or float32, or int32 token ids where `spec.vocabulary` says so.
        """


@dataclass(eq=False)
class ArraySource:
    """A source over arrays `[n, *input_shape]` (uint8, float32 or int32 token ids), in memory or mapped from a file."""

    spec: DataSpec
    train_samples: np.ndarray
    train_labels: np.ndarray
    test_samples: np.ndarray
    test_labels: np.ndarray
    train_owner: np.ndarray | None = None
    shared: bool = field(default=False, kw_only=True)  # one copy for all ranks of a node

    @property
    def mapped(self) -> bool:
        """The samples are mapped from files, so that the system holds one copy a node."""
        return isinstance(self.train_samples, np.memmap) and isinstance(self.test_samples, np.memmap)

    def arrays(self) -> dict[str, np.ndarray]:
        """Its arrays by the names of its fields."""
        names = ("train_samples", "train_labels", "test_samples", "test_labels", "train_owner")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def take(self, split: Split, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `Source.take`; only the rows asked for are copied, also out of a mapped file or a transposed view."""
        train = split == "train"
        samples = (self.train_samples if train else self.test_samples)[indices]
        labels = (self.train_labels if train else self.test_labels)[indices]
        return torch.from_numpy(np.ascontiguousarray(samples)), torch.from_numpy(labels)


def shared(source: Source) -> bool:
    """Whether the ranks of a node have one copy of it, out of which samples are taken when they are wanted."""
    return bool(getattr(source, "shared", False))


def part(source: Source, split: Split, indices: np.ndarray) -> ArraySource:
    """Those samples alone, in memory, as training samples; without a test part."""
    x, y = (tensor.numpy() for tensor in source.take(split, indices))
    return ArraySource(source.spec, x, y, x[:0], y[:0])


class Rows:
    """Some samples of a source as stored, `[len(self), *input_shape]`, taken batch by batch when they are wanted."""

    def __init__(self, source: Source, split: Split, indices: np.ndarray) -> None:
        self._source, self._split, self._indices = source, split, indices

    def __len__(self) -> int:
        return len(self._indices)

    def split(self, size: int, /) -> Iterator[Tensor]:
        """In order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self._source.take(self._split, self._indices[start : start + size])[0]


def data_root(root: str) -> Path:
    """The folder of the data sets: `data.root`, or where that is empty `$MPIFED_DATA`, or `data`."""
    return Path(root or os.environ.get("MPIFED_DATA") or "data").expanduser()


def require_file(path: Path, root: Path, download: bool) -> None:
    """Raise `BadInput` unless `path`, which belongs to a public data set, is a file."""
    if not path.is_file():
        instead = "" if download else ", or set data.download = true"
        raise BadInput(
            f"data.root: there is no file {path} (data.root is '{root}'); "
            f"put the data set there as torchvision lays it out, point data.root or MPIFED_DATA at it{instead}"
        )


@contextmanager
def downloading(root: Path) -> Iterator[None]:
    """Around a download: the ranks take turns, so that one fetches and the others find it there.

    A failure becomes `BadInput`, since it is the job that asked for the network.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            if os.access(root, os.W_OK):  # a read-only folder may hold everything already
                lock = stack.enter_context(open(root / ".download.lock", "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except (OSError, RuntimeError) as error:
        raise BadInput(
            f"data.download: fetching the data set into {root} failed ({error}); "
            "check the network and the folder, or put the files there by hand"
        ) from error


def with_statistics(spec: DataSpec, mean: tuple[float, ...], std: tuple[float, ...]) -> DataSpec:
    """`spec` with the job's `data.mean` and `data.std` (one value, or one per channel) where they are given."""
    for key, values in (("mean", mean), ("std", std)):
        if len(values) not in (0, 1, spec.input_shape[0]):
            raise BadInput(
                f"data.{key} has {len(values)} values, but the samples have {spec.input_shape[0]} channels; "
                "give one value, or one per channel"
            )
        if not np.isfinite(values).all() or (key == "std" and any(value <= 0 for value in values)):
            raise BadInput(f"data.{key} = {list(values)} must be finite, and a std must be positive; correct it")
    return DataSpec(spec.input_shape, spec.classes, tuple(mean) or spec.mean, tuple(std) or spec.std)
