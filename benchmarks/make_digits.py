"""Write `mpifed/data/digits.h5`, the digits that come with the package.

usage:  pip download --no-deps scikit-learn
        python benchmarks/make_digits.py scikit_learn-*.whl mpifed/data/digits.h5

Source: the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0, in the copy that scikit-learn distributes: 1,797 images of
8x8 pixels with values 0..16. Nothing is changed but the order: 20 % of each class, drawn with a fixed seed, is test.
"""

from __future__ import annotations

import argparse
import gzip
import io
import zipfile
from pathlib import Path

import h5py
import numpy as np

TEST_SAMPLES = 360
SEED = 2011


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stratified indices of train and test, each ascending: a fifth of every class, largest remainders rounded up."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    counts = np.bincount(labels)
    exact = counts * TEST_SAMPLES / len(labels)
    tests = exact.astype(int)
    tests[np.argsort(tests - exact, kind="stable")[: TEST_SAMPLES - tests.sum()]] += 1
    test = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in enumerate(tests)])
    return np.setdiff1d(np.arange(len(labels)), test), np.sort(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="a wheel of scikit-learn")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with zipfile.ZipFile(args.wheel) as wheel:
        text = gzip.decompress(wheel.read("sklearn/datasets/data/digits.csv.gz"))
    table = np.loadtxt(io.BytesIO(text), delimiter=",").astype(np.uint8)
    pixels, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    train, test = split(labels)
    with h5py.File(args.out, "w") as file:
        for name, rows in (("train", train), ("test", test)):
            for leaf, values in (("x", pixels[rows]), ("y", labels[rows])):
                file.create_dataset(f"{name}/{leaf}", data=values, compression="gzip", shuffle=True, fletcher32=True)
        scaled = pixels[train] / 255.0  # as DataSpec.standardise scales it
        file.attrs.update(classes=10, mean=scaled.mean(), std=scaled.std())
        file.attrs["source"] = (
            "E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits (test set), "
            "UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0; split train/test anew"
        )
    print(f"{args.out}: {len(train)} + {len(test)} samples, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
