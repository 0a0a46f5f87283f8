"""MNIST, Fashion-MNIST and EMNIST, mapped into memory from the uncompressed idx files of torchvision's layout.

The operating system then holds one copy of the pixels a node, however many ranks read them.

- MNIST: LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
- Fashion-MNIST: Xiao, Rasul, Vollgraf, arXiv:1708.07747.
- EMNIST: Cohen, Afshar, Tapson, van Schaik, arXiv:1702.05373. Its files hold every image transposed and, in the split
  `letters`, labels from 1; here images are upright and labels start at 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from mpifed.data.source import ArraySource, data_root, downloading, require_file, with_statistics
from mpifed.errors import BadInput
from mpifed.types import DataSpec

EMNIST_CLASSES = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}


def mnist(
    *, root: str = "", download: bool = False, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> ArraySource:
    """60,000 + 10,000 digits `[1, 28, 28]` uint8 in `root/MNIST/raw`; 10 classes.

    `mean` and `std` standardise pixels in [0, 1]; empty means those of the training set, 0.5 and 0.5 give [-1, 1].
    Raises `BadInput` naming `data.root` and the file where one is missing or damaged.
    """
    folder = data_root(root)
    if download:
        from torchvision.datasets import MNIST

        with downloading(folder):
            MNIST(str(folder), download=True)
    spec = DataSpec((1, 28, 28), 10, (0.1307,), (0.3081,))
    return _read(folder, "MNIST/raw", "train-{}", "t10k-{}", with_statistics(spec, mean, std), download)


def fashion_mnist(
    *, root: str = "", download: bool = False, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> ArraySource:
    """60,000 + 10,000 articles of clothing `[1, 28, 28]` uint8 in `root/FashionMNIST/raw`; as `mnist` otherwise."""
    folder = data_root(root)
    if download:
        from torchvision.datasets import FashionMNIST

        with downloading(folder):
            FashionMNIST(str(folder), download=True)
    spec = DataSpec((1, 28, 28), 10, (0.2860,), (0.3530,))
    return _read(folder, "FashionMNIST/raw", "train-{}", "t10k-{}", with_statistics(spec, mean, std), download)


def emnist(
    *,
    split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "letters",
    root: str = "",
    download: bool = False,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> ArraySource:
    """Handwritten characters `[1, 28, 28]` uint8 in `root/EMNIST/raw`, upright; as `mnist` otherwise.

    `letters`: 124,800 + 20,800, 26 classes.
    """
    folder = data_root(root)
    if download:
        from torchvision.datasets import EMNIST

        with downloading(folder):
            EMNIST(str(folder), split=split, download=True)
    spec = with_statistics(DataSpec((1, 28, 28), EMNIST_CLASSES[split], (0.1736,), (0.3317,)), mean, std)
    first_label = 1 if split == "letters" else 0
    train, test = f"emnist-{split}-train-{{}}", f"emnist-{split}-test-{{}}"
    return _read(folder, "EMNIST/raw", train, test, spec, download, transposed=True, first_label=first_label)


def _read(
    root: Path,
    subfolder: str,
    train: str,
    test: str,
    spec: DataSpec,
    download: bool,
    transposed: bool = False,
    first_label: int = 0,
) -> ArraySource:
    images, labels = [], []
    for name in (train, test):
        image_path = root / subfolder / name.format("images-idx3-ubyte")
        label_path = root / subfolder / name.format("labels-idx1-ubyte")
        for path in (image_path, label_path):
            require_file(path, root, download)
        pixels = map_idx(image_path, 3)
        classes = map_idx(label_path, 1).astype(np.int64) - first_label
        if pixels.shape[1:] != spec.input_shape[1:]:
            raise BadInput(f"data.root: {image_path} has images of {pixels.shape[1:]}, not (28, 28); replace the file")
        if len(pixels) != len(classes):
            raise BadInput(
                f"data.root: {image_path} has {len(pixels)} images but {label_path.name} {len(classes)} labels; "
                "replace both files"
            )
        if classes.min() < 0 or classes.max() >= spec.classes:
            raise BadInput(
                f"data.root: {label_path} has labels outside {first_label}..{spec.classes - 1 + first_label}; "
                "replace the file"
            )
        images.append((pixels.transpose(0, 2, 1) if transposed else pixels)[:, None])
        labels.append(classes)
    return ArraySource(spec, images[0], labels[0], images[1], labels[1])


def map_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes as a read-only array over the file.

    The header is big-endian 32-bit: 0x00000800 + dimensions, then the length of each. Raises `BadInput`.
    """
    header = np.fromfile(path, dtype=">u4", count=1 + dimensions)
    if len(header) != 1 + dimensions or header[0] != 0x0800 + dimensions:
        raise BadInput(f"data.root: {path} is not an idx file of {dimensions} dimensions; replace the file")
    shape = tuple(int(length) for length in header[1:])
    expected, actual = header.nbytes + int(np.prod(shape, dtype=object)), path.stat().st_size
    if 0 in shape or expected != actual:
        raise BadInput(
            f"data.root: {path} announces {shape}, which takes {expected} bytes, but has {actual}; replace the file"
        )
    return np.memmap(path, dtype=np.uint8, mode="r", offset=header.nbytes, shape=shape)
