"""CIFAR-10, CIFAR-100 and SVHN through torchvision, which checks every file's MD5 before it opens it.

CIFAR's published files are Python pickles; torchvision's reader, after that check, is the only place that loads them.

- CIFAR: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
- SVHN: Netzer et al., "Reading digits in natural images with unsupervised feature learning", 2011.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from mpifed.data.source import ArraySource, data_root, downloading, require_file, with_statistics
from mpifed.errors import BadInput
from mpifed.types import DataSpec


def cifar10(
    *, root: str = "", download: bool = False, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> ArraySource:
    """50,000 + 10,000 photographs `[3, 32, 32]` uint8 in `root/cifar-10-batches-py`; 10 classes.

    `mean` and `std` (one value or one per channel) standardise pixels in [0, 1]; empty means those of the training set.
    Raises `BadInput` naming `data.root` and the file where one is missing or damaged.
    """
    spec = DataSpec((3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return _cifar(CIFAR10, data_root(root), with_statistics(spec, mean, std), download)


def cifar100(
    *, root: str = "", download: bool = False, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> ArraySource:
    """50,000 + 10,000 photographs `[3, 32, 32]` uint8 in `root/cifar-100-python`; 100 fine classes; as `cifar10`."""
    spec = DataSpec((3, 32, 32), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    return _cifar(CIFAR100, data_root(root), with_statistics(spec, mean, std), download)


def svhn(
    *, root: str = "", download: bool = False, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> ArraySource:
    """73,257 + 26,032 house-number digits `[3, 32, 32]` uint8, `root/{train,test}_32x32.mat`; 10 classes; as `cifar10`.

    Needs SciPy, which reads the files.
    """
    folder = data_root(root)
    spec = with_statistics(DataSpec((3, 32, 32), 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)), mean, std)
    parts: list[np.ndarray] = []
    for split in ("train", "test"):
        if download:
            with downloading(folder):
                SVHN(str(folder), split=split, download=True)
        require_file(folder / SVHN.split_list[split][1], folder, download)
        try:
            part = SVHN(str(folder), split=split)
        except ImportError as error:
            raise BadInput("data.name = 'svhn' needs SciPy to read its files; pip install scipy") from error
        except RuntimeError as error:
            raise _damaged(folder / SVHN.split_list[split][1]) from error
        parts += [part.data, part.labels.astype(np.int64)]
    return ArraySource(spec, *parts)


def _cifar(dataset: type[CIFAR10], root: Path, spec: DataSpec, download: bool) -> ArraySource:
    if download:
        with downloading(root):
            dataset(str(root), download=True)
    folder = root / dataset.base_folder
    for name in (*(name for name, _ in dataset.train_list + dataset.test_list), dataset.meta["filename"]):
        require_file(folder / name, root, download)
    parts: list[np.ndarray] = []
    for train in (True, False):
        try:
            part = dataset(str(root), train=train)
        except RuntimeError as error:
            raise _damaged(folder) from error
        parts += [part.data.transpose(0, 3, 1, 2), np.asarray(part.targets, dtype=np.int64)]
    return ArraySource(spec, *parts)


def _damaged(path: Path) -> BadInput:
    return BadInput(
        f"data.root: {path} does not have the checksum of the published data set; remove it and fetch it again"
    )
