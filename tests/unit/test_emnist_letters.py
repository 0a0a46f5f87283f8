"""`benchmarks/make_emnist_letters.py`: from idx files to the project's HDF5 format."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mpifed.data.hdf5 import HDF5Source

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_emnist_letters.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_emnist_letters", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_idx(path: Path, array: np.ndarray) -> str:
    header = np.array([0x0800 + array.ndim, *array.shape], dtype=">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())
    return str(path)


def emnist(folder: Path, name: str, labels: np.ndarray) -> list[str]:
    """Images whose pixel (row 1, column 2), as stored, is their number and whose rest is 0."""
    images = np.zeros((len(labels), 28, 28))
    images[:, 1, 2] = np.arange(len(labels))
    return [write_idx(folder / f"{name}-images", images), write_idx(folder / f"{name}-labels", labels)]


LABELS = np.tile(np.arange(8), 12)
"""Eight stored classes of twelve samples; sample i has class i mod 8."""


def samples(path: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers (see `emnist`) and labels of a part of the file, all of whose images are upright."""
    source = HDF5Source(path=str(path))
    labels = source.train_labels if part == "train" else source.test_labels
    images, _ = source.take("train" if part == "train" else "test", np.arange(len(labels)))
    numbers = images[:, 0, 2, 1].numpy()
    assert images.sum() == numbers.sum()
    return numbers, labels


def test_one_file_is_split_by_class(tool: ModuleType, tmp_path: Path) -> None:
    out, files = tmp_path / "letters.h5", emnist(tmp_path, "all", LABELS)
    tool.main([str(out), "--classes", "5", "2", "--per-class", "7", "--train", *files])
    numbers, labels = samples(out, "train")
    others, their_labels = samples(out, "test")
    assert np.bincount(labels).tolist() == [7, 7]
    assert np.bincount(their_labels).tolist() == [5, 5]
    # class 5 became 0 and class 2 became 1, each sample is there once and keeps its class
    assert np.array_equal(np.where(labels == 0, 5, 2), numbers % 8)
    assert np.array_equal(np.where(their_labels == 0, 5, 2), others % 8)
    assert sorted([*numbers, *others]) == [i for i in range(96) if i % 8 in (2, 5)]
    source = HDF5Source(path=str(out))
    assert source.spec.classes == 2
    pixels = np.zeros((14, 784))
    pixels[:, 0] = numbers / 255
    assert source.spec.mean == pytest.approx([pixels.mean()]) and source.spec.std == pytest.approx([pixels.std()])


def test_the_split_is_a_function_of_the_seed(tool: ModuleType, tmp_path: Path) -> None:
    files = emnist(tmp_path, "all", LABELS)
    parts = []
    for number, seed in enumerate("001"):
        out = tmp_path / f"{number}.h5"
        tool.main([str(out), "--classes", "1", "--per-class", "6", "--seed", seed, "--train", *files])
        parts.append(samples(out, "train")[0].tolist())
    assert parts[0] == parts[1] != parts[2]


def test_a_test_set_of_its_own(tool: ModuleType, tmp_path: Path) -> None:
    """As torchvision's letters: labels from 1, and both parts whole."""
    out = tmp_path / "letters.h5"
    train, test = emnist(tmp_path, "train", LABELS + 1), emnist(tmp_path, "test", LABELS[:16] + 1)
    tool.main([str(out), "--classes", "1", "2", "3", "--train", *train, "--test", *test])
    numbers, labels = samples(out, "train")
    assert len(labels) == 36 and np.array_equal(labels, numbers % 8)
    numbers, labels = samples(out, "test")
    assert labels.tolist() == [0, 1, 2, 0, 1, 2] and np.array_equal(labels, numbers % 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--classes", "9"], "no sample of class 9"),
        (["--classes", "1", "1"], "names a class twice"),
        (["--classes", "1", "--per-class", "12"], "leaves none of label 0 to test: it has 12"),
    ],
)
def test_refusals(tool: ModuleType, tmp_path: Path, options: list[str], said: str) -> None:
    files = emnist(tmp_path, "all", LABELS)
    with pytest.raises(SystemExit, match=said):
        tool.main([str(tmp_path / "out.h5"), *options, "--train", *files])
    with pytest.raises(SystemExit, match="is not an idx file"):
        tool.main([str(tmp_path / "out.h5"), "--classes", "1", "--train", files[1], files[0]])
    short = write_idx(tmp_path / "short", LABELS[:5])
    with pytest.raises(SystemExit, match="96 images but .* 5 labels"):
        tool.main([str(tmp_path / "out.h5"), "--classes", "1", "--train", files[0], short])
    assert not (tmp_path / "out.h5").exists()
