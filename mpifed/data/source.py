"""What a data set is to the rest of the program, and what the file-based ones share."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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

    def take(self, split: Split, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `Source.take`; only the rows asked for are copied, also out of a mapped file or a transposed view."""
        train = split == "train"
        samples = (self.train_samples if train else self.test_samples)[indices]
        labels = (self.train_labels if train else self.test_labels)[indices]
        return torch.from_numpy(np.ascontiguousarray(samples)), torch.from_numpy(labels)


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
