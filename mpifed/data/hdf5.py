"""Data sets in HDF5 files: one's own, and the digits that come with the program.

The format is described in `docs/data.md`. A file is checked whole before it is used: it is never followed out of itself
(soft and external links, external and virtual storage), and nothing in it is an object.

`digits.h5` holds the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0; written by `benchmarks/make_digits.py`.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from mpifed.data.source import Split, data_root
from mpifed.errors import BadInput
from mpifed.types import DataSpec

BLOCK_BYTES = 8 << 20
"""Samples are read in runs of about this many bytes, so that a few rows never cost the whole file."""


def digits() -> HDF5Source:
    """1,437 + 360 handwritten digits `[1, 8, 8]`, uint8 0..16; 10 classes; part of the package, no file needed."""
    return HDF5Source(path=str(Path(__file__).with_name("digits.h5")))


class HDF5Source:
    """The data set in the HDF5 file `path`, taken relative to `root` unless absolute; see `docs/data.md`.

    Raises `BadInput` naming the file and the dataset for anything that training could not use.
    """

    def __init__(self, *, path: str, root: str = "") -> None:
        self._path = data_root(root) / Path(path).expanduser()
        if not self._path.is_file():
            raise BadInput(f"data.path: there is no file {self._path}; correct data.path, data.root or MPIFED_DATA")
        try:
            with h5py.File(self._path, "r", locking=False) as file:
                self._check(file)
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:  # h5py's, for what HDF5 cannot read
            raise self._unreadable(error) from error

    def take(self, split: Split, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `Source.take`; the file is open only meanwhile."""
        indices = np.asarray(indices, dtype=np.int64)
        labels = (self.train_labels if split == "train" else self.test_labels)[indices]
        samples = np.empty((len(indices), *self.spec.input_shape), dtype=self._dtype)
        order = np.argsort(indices, kind="stable")
        wanted = indices[order]
        try:
            with h5py.File(self._path, "r", locking=False) as file:
                dataset = file[f"{split}/x"]
                rows = _rows_per_block(dataset)
                start = 0
                while start < len(wanted):
                    # HDF5 selects single rows slowly: read the run from first to last wanted row of a block instead.
                    first = wanted[start]
                    stop = int(np.searchsorted(wanted, (first // rows + 1) * rows))
                    run = dataset[first : wanted[stop - 1] + 1]
                    samples[order[start:stop]] = run[wanted[start:stop] - first].reshape(-1, *self.spec.input_shape)
                    start = stop
        except OSError as error:
            raise self._unreadable(error) from error
        return torch.from_numpy(samples), torch.from_numpy(labels)

    # --- checks, all before the first round ---------------------------------------------------------------------------
    def _check(self, file: h5py.File) -> None:
        shapes, labels = {}, {}
        for split in ("train", "test"):
            x, y = self._dataset(file, f"{split}/x"), self._dataset(file, f"{split}/y")
            shapes[split] = (self._sample_shape(x), x.dtype)
            labels[split] = self._integers(y, len(x))
            if x.dtype.kind == "f":
                self._check_finite(x)
        if shapes["train"] != shapes["test"]:
            raise self._bad(
                "test/x",
                f"has samples {shapes['test'][0]} of {shapes['test'][1]}, "
                f"but train/x {shapes['train'][0]} of {shapes['train'][1]}",
            )
        shape, self._dtype = shapes["train"]
        self.train_labels, self.test_labels = labels["train"], labels["test"]
        self.train_owner: np.ndarray | None = None
        if file["train"].get("client", getlink=True) is not None:
            self.train_owner = self._integers(self._dataset(file, "train/client"), len(self.train_labels))
        classes = self._classes(file)
        mean, std = self._attribute(file, "mean"), self._attribute(file, "std")
        for name, values in (("mean", mean), ("std", std)):
            if values and self._dtype != np.uint8:
                raise self._bad(
                    f"attribute {name}", "is given, but only uint8 samples are standardised: do it yourself"
                )
            if len(values) not in (0, 1, shape[0]) or (name == "std" and min(values, default=1.0) <= 0):
                raise self._bad(f"attribute {name}", f"is {values}: give one value, or one per channel, std positive")
        self.spec = DataSpec(shape, classes, mean or (0.0,), std or (1.0,))

    def _dataset(self, file: h5py.File, name: str) -> h5py.Dataset:
        """The dataset `group/leaf`, sure to lie inside this file and to hold plain numbers."""
        dataset = file
        for step in name.split("/"):  # look at each link before anything follows it
            link = dataset.get(step, getlink=True) if isinstance(dataset, h5py.Group) else None
            if link is None:
                raise self._bad(name, "is missing")
            if not isinstance(link, h5py.HardLink):
                raise self._bad(name, "is behind a soft or external link: copy the data into the file")
            dataset = dataset[step]
        if not isinstance(dataset, h5py.Dataset):
            raise self._bad(name, "is not a dataset")
        if dataset.is_virtual or dataset.external:
            raise self._bad(name, "is stored outside the file (virtual or external storage): copy the data into it")
        if dataset.dtype.kind not in "uif":
            raise self._bad(name, f"has type {dataset.dtype}: store plain numbers")
        if dataset.ndim == 0 or dataset.size == 0:
            raise self._bad(name, f"has shape {dataset.shape}: store at least one sample")
        if dataset.id.get_storage_size() == 0:
            raise self._bad(name, "was created but never written")
        return dataset

    def _sample_shape(self, x: h5py.Dataset) -> tuple[int, ...]:
        if x.dtype == np.uint8:
            if x.ndim not in (3, 4):
                raise self._bad(x.name, f"has shape {x.shape}: uint8 images are [n, h, w] or [n, channels, h, w]")
            if x.ndim == 4 and x.shape[1] > 4 and x.shape[3] <= 4:
                raise self._bad(x.name, f"has shape {x.shape}, channels last: store [n, channels, h, w]")
        elif x.dtype != np.float32:
            raise self._bad(x.name, f"has type {x.dtype}: store uint8 or float32")
        elif x.ndim < 2:
            raise self._bad(x.name, f"has shape {x.shape}: store [n, ...] with at least one number per sample")
        shape = tuple(int(length) for length in x.shape[1:])
        return (1, *shape) if x.ndim == 3 else shape  # [n, h, w] is one channel

    def _integers(self, y: h5py.Dataset, samples: int) -> np.ndarray:
        """Labels or client ids: non-negative integers, one per sample."""
        if y.ndim != 1 or y.dtype.kind not in "ui":
            raise self._bad(y.name, f"is {y.dtype} {y.shape}: store integers [n]")
        if len(y) != samples:
            raise self._bad(y.name, f"has {len(y)} entries for {samples} samples")
        values = y[()]
        if values.min() < 0 or values.max() > np.iinfo(np.int64).max:
            raise self._bad(y.name, f"has values from {values.min()} to {values.max()}: they must be 0 or more")
        return values.astype(np.int64)

    def _classes(self, file: h5py.File) -> int:
        given = self._attribute(file, "classes")
        highest = {"train/y": int(self.train_labels.max()), "test/y": int(self.test_labels.max())}
        if not given:
            classes = max(highest.values()) + 1
            if classes > len(self.train_labels):
                raise self._bad("train/y", f"has labels up to {classes - 1} for {len(self.train_labels)} samples: "
                                "number the classes from 0, or set the file's attribute classes")  # fmt: skip
            return classes
        if len(given) != 1 or given[0] != int(given[0]) or given[0] < 1:
            raise self._bad("attribute classes", f"is {given}: store one positive integer")
        classes = int(given[0])
        for name, label in highest.items():
            if label >= classes:
                raise self._bad(name, f"has label {label}, but the attribute classes is {classes}")
        return classes

    def _attribute(self, file: h5py.File, name: str) -> tuple[float, ...]:
        if name not in file.attrs:
            return ()
        stored = file.attrs.get_id(name)
        if stored.dtype.kind not in "uif" or len(stored.shape) > 1 or not 1 <= np.prod(stored.shape) <= 4096:
            raise self._bad(
                f"attribute {name}", f"is {stored.dtype} {stored.shape}: store numbers, one or a short list"
            )
        values = tuple(float(value) for value in np.atleast_1d(file.attrs[name]))
        if not np.isfinite(values).all():
            raise self._bad(f"attribute {name}", f"is {values}: store finite numbers")
        return values

    def _check_finite(self, x: h5py.Dataset) -> None:
        rows = _rows_per_block(x)
        for start in range(0, len(x), rows):
            finite = np.isfinite(x[start : start + rows]).reshape(-1, int(np.prod(x.shape[1:]))).all(axis=1)
            if not finite.all():
                raise self._bad(x.name, f"has NaN or Inf in sample {start + int(np.argmin(finite))}: repair it")

    def _bad(self, name: str, problem: str) -> BadInput:
        return BadInput(f"data.path: in {self._path}, {name.lstrip('/')} {problem}")

    def _unreadable(self, error: Exception) -> BadInput:
        return BadInput(f"data.path: {self._path} cannot be read as HDF5 ({error}); write the file again")


def _rows_per_block(dataset: h5py.Dataset) -> int:
    """Rows in about `BLOCK_BYTES`, a whole number of chunks where the dataset has them."""
    rows = max(1, BLOCK_BYTES // max(1, dataset.nbytes // len(dataset)))
    chunk = dataset.chunks[0] if dataset.chunks else 1
    return max(chunk, rows // chunk * chunk)
