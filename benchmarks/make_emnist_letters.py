"""Write FedMD's private letters a-f, out of EMNIST's files, as one HDF5 file for `data.name = "hdf5"`.

usage:  # a part of the balanced split, whose classes 10 to 15 are A to F (and whose a, b, d, e, f are 36 to 40)
        python benchmarks/make_emnist_letters.py letters.h5 --classes 10 11 12 13 14 15 \\
            --train EMNIST/raw/NAME-images-idx3-ubyte EMNIST/raw/NAME-labels-idx1-ubyte
        # the split of letters as torchvision unpacks it: both cases in one class, labels from 1, a test set of its own
        python benchmarks/make_emnist_letters.py letters.h5 --classes 1 2 3 4 5 6 \\
            --train EMNIST/raw/emnist-letters-train-{images-idx3,labels-idx1}-ubyte \\
            --test EMNIST/raw/emnist-letters-test-{images-idx3,labels-idx1}-ubyte

The classes are numbered anew from 0 in the order given (a job's `data.public_classes = "union"` puts them after the
public digits). Images are written upright; EMNIST stores them transposed. Without `--test`, `--per-class` samples of
each class, drawn by `--seed`, are the training set and all others the test set: 60 are enough for 10 parties of 3 a
class and leave as many for a validation set.

EMNIST: Cohen, Afshar, Tapson, van Schaik, 2017, arXiv:1702.05373; NIST, public domain.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from mpifed.data.idx import map_idx
from mpifed.errors import BadInput

Samples = tuple[np.ndarray, np.ndarray]


def read(files: Sequence[Path], classes: Sequence[int]) -> Samples:
    """The images of those stored classes, upright uint8 `[n, 28, 28]`, and their new labels uint8 `[n]`."""
    images, labels = map_idx(files[0], 3), map_idx(files[1], 1)
    if len(images) != len(labels):
        raise BadInput(f"{files[0]} has {len(images)} images but {files[1]} {len(labels)} labels")
    rows = np.flatnonzero(np.isin(labels, classes))
    for stored in classes:
        if stored not in labels[rows]:
            raise BadInput(f"{files[1]} has no sample of class {stored}")
    new = np.array([list(classes).index(stored) for stored in labels[rows]], dtype=np.uint8)
    return images[rows].transpose(0, 2, 1), new


def split(samples: Samples, per_class: int, seed: int) -> tuple[Samples, Samples]:
    """`per_class` random samples of each class, and the others; both in the order of the file."""
    x, y = samples
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = []
    for label, count in zip(*np.unique(y, return_counts=True), strict=True):
        if count <= per_class:
            raise BadInput(f"--per-class {per_class} leaves none of label {label} to test: it has {count}")
        chosen.append(rng.permutation(np.flatnonzero(y == label))[:per_class])
    train = np.zeros(len(y), dtype=bool)
    train[np.concatenate(chosen)] = True
    return (x[train], y[train]), (x[~train], y[~train])


def write(path: Path, train: Samples, test: Samples) -> None:
    """The file, in the format of `docs/data.md`; mean and standard deviation are those of the training pixels."""
    with h5py.File(path, "w") as file:
        for part, samples in (("train", train), ("test", test)):
            for leaf, values in zip("xy", samples, strict=True):
                file.create_dataset(f"{part}/{leaf}", data=values, compression="gzip", shuffle=True, fletcher32=True)
        scaled = train[0] / 255.0
        file.attrs.update(classes=int(train[1].max()) + 1, mean=scaled.mean(), std=scaled.std())
        file.attrs["source"] = "EMNIST (Cohen, Afshar, Tapson, van Schaik, 2017, arXiv:1702.05373), classes renumbered"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pair = {"nargs": 2, "type": Path, "metavar": ("IMAGES", "LABELS")}
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", required=True, **pair, help="unpacked idx files")
    parser.add_argument("--test", **pair, help="the same for the test set; otherwise a part of --train")
    parser.add_argument("--classes", required=True, nargs="+", type=int, help="labels as stored, in their new order")
    parser.add_argument("--per-class", type=int, default=60, help="training samples of a class, without --test")
    parser.add_argument("--seed", type=int, default=0, help="which they are")
    args = parser.parse_args(arguments)
    try:
        if len(set(args.classes)) < len(args.classes):
            raise BadInput(f"--classes {args.classes} names a class twice")
        train = read(args.train, args.classes)
        if args.test is None:
            train, test = split(train, args.per_class, args.seed)
        else:
            test = read(args.test, args.classes)
    except (BadInput, OSError) as error:
        sys.exit(str(error).removeprefix("data.root: "))
    write(args.out, train, test)
    print(f"{args.out}: {len(train[1])} + {len(test[1])} samples of {len(args.classes)} classes")


if __name__ == "__main__":
    main()
