"""Data sets: what they give, and what they refuse before it does harm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from mpifed.component import bind, resolve
from mpifed.data import SOURCES, hdf5
from mpifed.data.hdf5 import HDF5Source, digits
from mpifed.data.idx import emnist, fashion_mnist, mnist
from mpifed.data.selection import Selected
from mpifed.data.source import ArraySource, Source
from mpifed.data.synthetic import Synthetic
from mpifed.data.vision import cifar10, cifar100, svhn
from mpifed.errors import BadInput
from mpifed.types import DataSpec

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_found_and_takes_keywords_alone(name: str) -> None:
    source = resolve(SOURCES, name, "data.name")
    parameters = bind(source, {"path": "x.h5"} if name == "hdf5" else {}, "data")
    with pytest.raises(TypeError, match="positional"):
        source(*parameters.values(), "one too many")


# --- idx files -------------------------------------------------------------------------------------------------------
def idx(array: np.ndarray) -> bytes:
    """An idx file of unsigned bytes: 0, 0, type 8, number of dimensions; the lengths, big-endian; the bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def write_idx(root: Path, folder: str, train: str, test: str, labels: int = 10, first_label: int = 0) -> np.ndarray:
    """30 training and 20 test images of random pixels; image i has label i mod `labels`; the training images."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    (root / folder).mkdir(parents=True)
    for stem, part in ((train, pixels[:30]), (test, pixels[30:])):
        classes = (np.arange(len(part)) % labels + first_label).astype(np.uint8)
        (root / folder / f"{stem}-images-idx3-ubyte").write_bytes(idx(part))
        (root / folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx(classes))
    return pixels[:30]


@pytest.mark.parametrize(("make", "folder"), [(mnist, "MNIST/raw"), (fashion_mnist, "FashionMNIST/raw")])
def test_idx_rows_come_in_the_order_asked_for(make: Callable[..., Source], folder: str, tmp_path: Path) -> None:
    pixels = write_idx(tmp_path, folder, "train", "t10k")
    source = make(root=str(tmp_path))
    assert source.spec.input_shape == (1, 28, 28) and source.spec.classes == 10
    assert source.train_labels.dtype == np.int64 and len(source.test_labels) == 20 and source.train_owner is None
    x, y = source.take("train", np.array([17, 3, 17]))
    assert x.dtype == torch.uint8 and x.is_contiguous() and y.tolist() == [7, 3, 7]
    assert (x.numpy() == pixels[[17, 3, 17]][:, None]).all()
    assert len(source.take("test", np.array([], dtype=np.int64))[0]) == 0


def test_idx_pixels_stay_in_the_file_and_copies_are_ones_own(tmp_path: Path) -> None:
    """The array is a map of the file (its base is one), and writing into what `take` gave changes nothing."""
    write_idx(tmp_path, "MNIST/raw", "train", "t10k")
    source = mnist(root=str(tmp_path))
    assert isinstance(source.train_samples, np.memmap) and not source.train_samples.flags.writeable
    x, y = source.take("train", np.arange(30))
    before = x.clone()
    x.zero_()
    y.zero_()
    assert (source.take("train", np.arange(30))[0] == before).all() and source.train_labels.max() == 9


def test_emnist_letters_are_upright_and_count_from_zero(tmp_path: Path) -> None:
    pixels = write_idx(tmp_path, "EMNIST/raw", "emnist-letters-train", "emnist-letters-test", 26, first_label=1)
    source = emnist(root=str(tmp_path))
    x, y = source.take("train", np.array([0, 25, 26]))
    assert y.tolist() == [0, 25, 0] and source.spec.classes == 26
    assert (x[1, 0].numpy() == pixels[25].T).all()


def test_root_comes_from_the_environment_where_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "here", "MNIST/raw", "train", "t10k")
    monkeypatch.setenv("MPIFED_DATA", str(tmp_path / "here"))
    assert len(mnist().train_labels) == 30
    with pytest.raises(BadInput, match=re.escape(str(tmp_path / "MNIST/raw/train-images-idx3-ubyte"))):
        mnist(root=str(tmp_path))  # a root that is given is not second-guessed


def test_mean_and_std_of_the_job(tmp_path: Path) -> None:
    """(p / 255 - 0.5) / 0.5 takes 0 to -1 and 255 to 1."""
    write_idx(tmp_path, "MNIST/raw", "train", "t10k")
    spec = mnist(root=str(tmp_path), mean=(0.5,), std=(0.5,)).spec
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert spec.standardise(ends).flatten().tolist() == [-1.0, 1.0]
    for keys, named in (({"mean": (0.1, 0.2)}, "mean"), ({"std": (0.0,)}, "std"), ({"std": (0.1, 0.1, 0.1)}, "std")):
        with pytest.raises(BadInput, match=rf"data\.{named}"):
            mnist(root=str(tmp_path), **keys)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        (IMAGES, lambda data: b"", "not an idx file"),
        (IMAGES, lambda data: data[:9], "not an idx file"),
        (IMAGES, lambda data: b"\x1f\x8b" + data[2:], "not an idx file"),
        (LABELS, lambda data: data[:3] + b"\x03" + data[4:], "not an idx file"),
        (IMAGES, lambda data: data[:-1], "but has"),
        (IMAGES, lambda data: data + b"\0", "but has"),
        (IMAGES, lambda data: data[:4] + b"\xff" * 12 + data[16:], "but has"),
        (IMAGES, lambda data: idx(np.zeros((0, 28, 28), dtype=np.uint8)), "but has"),
        (IMAGES, lambda data: idx(np.zeros((30, 14, 14), dtype=np.uint8)), "not \\(28, 28\\)"),
        (IMAGES, lambda data: idx(np.zeros((29, 28, 28), dtype=np.uint8)), "29 images but .* 30 labels"),
        (LABELS, lambda data: data[:-1] + b"\x0a", "labels outside 0..9"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, file: str, damage: Callable[[bytes], bytes], problem: str) -> None:
    write_idx(tmp_path, "MNIST/raw", "train", "t10k")
    path = tmp_path / "MNIST/raw" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match=rf"data\.root: .*{problem}"):
        mnist(root=str(tmp_path))


# --- torchvision's ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "file"),
    [
        (mnist, "MNIST/raw/train-images-idx3-ubyte"),
        (fashion_mnist, "FashionMNIST/raw/train-images-idx3-ubyte"),
        (emnist, "EMNIST/raw/emnist-letters-train-images-idx3-ubyte"),
        (cifar10, "cifar-10-batches-py/data_batch_1"),
        (cifar100, "cifar-100-python/train"),
        (svhn, "train_32x32.mat"),
    ],
)
def test_a_missing_file_is_named(make: Callable[..., Source], file: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"data\.root: there is no file {re.escape(str(tmp_path / file))}.*download"):
        make(root=str(tmp_path))


@pytest.mark.parametrize(
    ("make", "files"),
    [
        (cifar10, [f"cifar-10-batches-py/{name}" for name in
                   (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")]),
        (cifar100, [f"cifar-100-python/{name}" for name in ("train", "test", "meta")]),
    ],
)  # fmt: skip
def test_a_forged_cifar_file_is_not_opened(make: Callable[..., Source], files: list[str], tmp_path: Path) -> None:
    """These bytes are a pickle that makes a file when it is loaded."""
    trace = tmp_path / "executed"
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.")
    with pytest.raises(BadInput, match=r"data\.root: .*checksum"):
        make(root=str(tmp_path))
    assert not trace.exists()


def test_a_failed_download_is_an_error_for_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **keys: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    for make in (mnist, cifar10):
        with pytest.raises(BadInput, match=r"data\.download: .*no route to host"):
            make(root=str(tmp_path / "new"), download=True)


# --- HDF5 ------------------------------------------------------------------------------------------------------------
def write_hdf5(path: Path, x: np.ndarray | None = None, **storage: Any) -> np.ndarray:
    """40 training and 10 test images of three classes, 4 x 5 pixels; the training images."""
    x = np.random.default_rng(0).integers(0, 256, (50, 4, 5), dtype=np.uint8) if x is None else x
    with h5py.File(path, "w") as file:
        for part, rows in (("train", slice(0, 40)), ("test", slice(40, 50))):
            file.create_dataset(f"{part}/x", data=x[rows], **storage)
            file[f"{part}/y"] = np.arange(len(x[rows])) % 3
    return x[:40]


def test_hdf5_gray_images(tmp_path: Path) -> None:
    x = write_hdf5(tmp_path / "a.h5")
    source = HDF5Source(path="a.h5", root=str(tmp_path))
    assert source.spec.input_shape == (1, 4, 5) and source.spec.classes == 3
    assert (source.spec.mean, source.spec.std, source.train_owner) == ((0.0,), (1.0,), None)
    samples, labels = source.take("train", np.array([39, 0, 7, 0]))
    assert samples.dtype == torch.uint8 and (samples.numpy() == x[[39, 0, 7, 0]][:, None]).all()
    assert labels.dtype == torch.int64 and labels.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("storage", [{}, {"chunks": (7, 2, 3), "compression": "gzip"}, {"chunks": (10, 1, 1)}])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_hdf5_any_rows_whatever_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: dict[str, Any], block: int
) -> None:
    """A block of 1 byte means one row (or chunk) at a time, one of 100 bytes five rows of 20 bytes."""
    monkeypatch.setattr(hdf5, "BLOCK_BYTES", block)
    rng = np.random.default_rng(0)
    x = write_hdf5(tmp_path / "a.h5", **storage)
    source = HDF5Source(path=str(tmp_path / "a.h5"))
    for k in (0, 1, 13, 200):
        rows = rng.integers(0, 40, k)
        assert (source.take("train", rows)[0].numpy() == x[rows][:, None]).all()


@pytest.mark.parametrize(("stored", "sample"), [((50, 3, 4, 5), (3, 4, 5)), ((50, 7), (7,)), ((50, 6, 2), (1, 6, 2))])
def test_hdf5_floats_are_used_as_they_are(tmp_path: Path, stored: tuple[int, ...], sample: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(stored, dtype=np.float32)
    write_hdf5(tmp_path / "a.h5", x)
    source = HDF5Source(path=str(tmp_path / "a.h5"))
    samples, _ = source.take("test", np.arange(10))
    assert source.spec.input_shape == sample
    assert samples.dtype == torch.float32 and (samples.numpy() == x[40:].reshape(10, *sample)).all()
    assert source.spec.standardise(samples) is samples


def test_hdf5_attributes_and_owners(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.h5", np.zeros((50, 3, 4, 5), dtype=np.uint8))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs.update(classes=5, mean=[0.1, 0.2, 0.3], std=0.5)
        file["train/client"] = np.arange(40, dtype=np.uint8) // 4
    source = HDF5Source(path=str(tmp_path / "a.h5"))
    assert (source.spec.classes, source.spec.mean, source.spec.std) == (5, (0.1, 0.2, 0.3), (0.5,))
    assert source.train_owner is not None and source.train_owner.dtype == np.int64
    assert source.train_owner.tolist() == [i // 4 for i in range(40)]


def replaced(name: str, value: object) -> Callable[[h5py.File], None]:
    def mutate(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return mutate


def removed(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.pop(name)


def attribute(name: str, value: object) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.update({name: value})


def made_float(value: float) -> Callable[[h5py.File], None]:
    def mutate(file: h5py.File) -> None:
        for part, n in (("train", 40), ("test", 10)):
            x = np.zeros((n, 4, 5), dtype=np.float32)
            x[n // 2, 3, 4] = value if part == "test" else 0.0
            replaced(f"{part}/x", x)(file)

    return mutate


def created(name: str, shape: tuple[int, ...], dtype: object, **keys: object) -> Callable[[h5py.File], None]:
    def mutate(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, shape, dtype, **keys)

    return mutate


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((40, 4, 5), np.uint8)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (40, 4, 5))
    del file["train/x"]
    file.create_virtual_dataset("train/x", layout)


y40 = np.arange(40) % 3
MUTATIONS: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "no train": (removed("train"), "train/x is missing"),
    "no test labels": (removed("test/y"), "test/y is missing"),
    "x is a group": (lambda f: (f.pop("train/x"), f.create_group("train/x"))[0], "train/x is not a dataset"),
    "train is a dataset": (lambda f: (f.pop("train"), f.create_dataset("train", data=[1]))[0], "train/x is missing"),
    "soft link": (replaced("train/x", h5py.SoftLink("/test/x")), "train/x is behind a soft or external link"),
    "dangling link": (replaced("train/y", h5py.SoftLink("/nowhere")), "train/y is behind a soft or external link"),
    "external link": (replaced("test/x", h5py.ExternalLink("b.h5", "/x")), "test/x is behind a soft or external"),
    "external group": (replaced("test", h5py.ExternalLink("b.h5", "/")), "test/x is behind a soft or external link"),
    "linked clients": (lambda f: f["train"].__setitem__("client", h5py.SoftLink("/train/y")),
                       "train/client is behind a soft or external link"),
    "external storage": (created("train/x", (40, 4, 5), np.uint8, external="raw.bin"), "train/x is stored outside"),
    "virtual": (virtual, "train/x is stored outside the file"),
    "strings": (replaced("train/y", ["a"] * 40), "train/y has type object"),
    "objects": (created("train/x", (40,), h5py.vlen_dtype(np.uint8)), "train/x has type object"),
    "references": (created("train/y", (40,), h5py.ref_dtype), "train/y has type object"),
    "compound": (replaced("train/y", np.zeros(40, dtype=[("a", "i4")])), "train/y has type"),
    "never written": (created("train/x", (2**40, 4, 5), np.uint8, chunks=(1, 4, 5)), "train/x was created but never"),
    "no samples": (replaced("test/x", np.zeros((0, 4, 5), dtype=np.uint8)), "test/x has shape"),
    "scalar": (replaced("test/y", 3), "test/y has shape"),
    "float64": (replaced("train/x", np.zeros((40, 4, 5))), "train/x has type float64"),
    "int32 pixels": (replaced("train/x", np.zeros((40, 4, 5), dtype=np.int32)), "train/x has type int32"),
    "flat uint8": (replaced("train/x", np.zeros((40, 20), dtype=np.uint8)), "train/x has shape .*uint8 images are"),
    "channels last": (replaced("train/x", np.zeros((40, 8, 8, 3), dtype=np.uint8)), "train/x .*channels last"),
    "flat float32": (replaced("train/x", np.zeros(40, dtype=np.float32)), "train/x has shape"),
    "fewer labels": (replaced("train/y", y40[:39]), "train/y has 39 entries for 40 samples"),
    "more labels": (replaced("train/y", np.arange(41) % 3), "train/y has 41 entries for 40 samples"),
    "one-hot labels": (replaced("train/y", np.eye(3, dtype=int)[y40]), "train/y is int64 .*store integers"),
    "float labels": (replaced("train/y", y40 * 1.0), "train/y is float64"),
    "negative label": (replaced("train/y", y40 - 1), "train/y has values from -1"),
    "huge label": (replaced("train/y", np.full(40, 2**63 + 1, dtype=np.uint64)), "train/y has values"),
    "ids as labels": (replaced("train/y", y40 * 1000), "train/y has labels up to 2000 for 40 samples"),
    "label over classes": (attribute("classes", 2), "train/y has label 2, but the attribute classes is 2"),
    "classes not whole": (attribute("classes", 2.5), "attribute classes is"),
    "classes negative": (attribute("classes", -1), "attribute classes is"),
    "classes a list": (attribute("classes", [3, 3]), "attribute classes is"),
    "classes a string": (attribute("classes", "three"), "attribute classes is object"),
    "two means": (attribute("mean", [0.1, 0.2]), "attribute mean is"),
    "zero std": (attribute("std", 0.0), "attribute std is"),
    "mean NaN": (attribute("mean", np.nan), "attribute mean is .*finite"),
    "huge attribute": (attribute("mean", np.zeros(5000)), "attribute mean is float64"),
    "other test shape": (replaced("test/x", np.zeros((10, 5, 4), dtype=np.uint8)), "test/x has samples"),
    "other test type": (replaced("test/x", np.zeros((10, 4, 5), dtype=np.float32)), "test/x has samples"),
    "NaN": (made_float(np.nan), "test/x has NaN or Inf in sample 5"),
    "Inf": (made_float(-np.inf), "test/x has NaN or Inf in sample 5"),
    "mean of floats": (lambda f: (made_float(0.0)(f), attribute("mean", 0.5)(f))[0], "attribute mean is given, but"),
    "clients too few": (lambda f: f["train"].__setitem__("client", [0, 1]), "train/client has 2 entries"),
    "clients negative": (lambda f: f["train"].__setitem__("client", y40 - 1), "train/client has values"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_hdf5_files_that_are_refused(tmp_path: Path, mutation: str) -> None:
    mutate, problem = MUTATIONS[mutation]
    path = tmp_path / "a.h5"
    write_hdf5(path)
    with h5py.File(tmp_path / "b.h5", "w") as other:  # what the external links would find
        other["x"] = np.zeros((10, 4, 5), dtype=np.uint8)
        other["y"] = np.zeros(10, dtype=int)
    with h5py.File(path, "a") as file:
        mutate(file)
    with pytest.raises(BadInput, match=rf"^data\.path: in {re.escape(str(path))}, {problem}"):
        HDF5Source(path=str(path))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"text", lambda data: data[: len(data) // 2]])
def test_what_is_no_hdf5_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.h5"
    write_hdf5(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match=rf"data\.path: {re.escape(str(path))} cannot be read as HDF5"):
        HDF5Source(path=str(path))


def test_hdf5_damage_in_the_samples_shows_when_they_are_taken(tmp_path: Path) -> None:
    """A flipped byte in a chunk with a checksum."""
    path = tmp_path / "a.h5"
    x = write_hdf5(path, chunks=(10, 4, 5), fletcher32=True)
    data = path.read_bytes()
    at = data.index(x[10:20].tobytes())
    path.write_bytes(data[: at + 5] + bytes([data[at + 5] ^ 1]) + data[at + 6 :])
    source = HDF5Source(path=str(path))
    source.take("train", np.arange(5))
    with pytest.raises(BadInput, match="cannot be read as HDF5"):
        source.take("train", np.arange(12))


def test_hdf5_missing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"data\.path: there is no file .*nothing\.h5; correct data\.path, data\.root"):
        HDF5Source(path="nothing.h5", root=str(tmp_path))


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "h5py" in block)
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, timeout=60)
    source = HDF5Source(path="mine.h5", root=str(tmp_path))
    assert source.spec.input_shape == (1, 28, 28) and source.spec.classes == 3
    assert source.train_owner is not None and len(np.unique(source.train_owner)) == 10
    x = source.spec.standardise(source.take("train", np.arange(200))[0])
    assert abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1


# --- built-in --------------------------------------------------------------------------------------------------------
def test_digits() -> None:
    """1,797 images, a fifth of each class for the test; standardised over the training part by construction."""
    source = digits()
    assert (source.spec.input_shape, source.spec.classes) == ((1, 8, 8), 10)
    train, test = np.bincount(source.train_labels), np.bincount(source.test_labels)
    assert (train.sum(), test.sum()) == (1437, 360)
    assert (abs(test - (train + test) / 5) < 1).all()
    x, _ = source.take("train", np.arange(1437))
    assert x.dtype == torch.uint8 and int(x.max()) == 16
    inputs = source.spec.standardise(x)
    assert float(inputs.mean()) == pytest.approx(0, abs=1e-4) and float(inputs.std()) == pytest.approx(1, abs=1e-3)


def test_digits_say_where_they_come_from_and_are_small() -> None:
    path = ROOT / "mpifed" / "data" / "digits.h5"
    assert path.stat().st_size < 100_000
    with h5py.File(path) as file:
        assert "Alpaydin" in file.attrs["source"] and "CC BY 4.0" in file.attrs["source"]


def test_a_linear_rule_reads_the_digits() -> None:
    """The nearest class mean is right about nine times in ten on this set; labels that had slipped would give one."""
    source = digits()
    x, y = source.take("train", np.arange(1437))
    means = torch.stack([x[y == c].float().mean(dim=0).flatten() for c in range(10)])
    x, y = source.take("test", np.arange(360))
    assert (torch.cdist(x.float().flatten(1), means).argmin(dim=1) == y).float().mean() > 0.85


def test_synthetic_samples_depend_on_seed_split_and_index_alone() -> None:
    source = Synthetic(samples=50, test_samples=20, input_shape=(2, 3), classes=4, seed=5)
    again = Synthetic(samples=50, test_samples=20, input_shape=(2, 3), classes=4, seed=5)
    whole, labels = source.take("train", np.arange(50))
    rows = np.array([31, 2, 31])
    assert (again.take("train", rows)[0] == whole[rows]).all() and (again.take("train", rows)[1] == labels[rows]).all()
    assert whole.dtype == torch.float32 and source.spec.input_shape == (2, 3)
    assert sorted(np.bincount(source.train_labels)) == [12, 12, 13, 13]
    other = Synthetic(samples=50, test_samples=20, input_shape=(2, 3), classes=4, seed=6)
    assert not torch.equal(other.take("train", rows)[0], whole[rows])
    assert len(torch.unique(torch.cat([whole, source.take("test", np.arange(20))[0]]).flatten(1), dim=0)) == 70


def test_synthetic_is_learnable() -> None:
    """Centres of length 6 in random directions are about 8.5 apart: from 100 samples a class in 16 dimensions, the
    estimated centre is off by sqrt(16 / 100) = 0.4, and half of 8.5 is more than four deviations."""
    source = Synthetic(samples=1000, test_samples=500, input_shape=(1, 4, 4), seed=1)
    x, y = source.take("train", np.arange(1000))
    means = torch.stack([x[y == c].mean(dim=0).flatten() for c in range(10)])
    x, y = source.take("test", np.arange(500))
    assert (torch.cdist(x.flatten(1), means).argmin(dim=1) == y).float().mean() > 0.9


# --- some classes of a set -------------------------------------------------------------------------------------------
def numbered_source(test_labels: list[int]) -> ArraySource:
    """Training samples 0..7 with labels 0, 1, 2, 3, 0, 1, 2, 3 and owners 10..17; test samples 100, 101, ..."""
    train, test = np.arange(8, dtype=np.float32), np.arange(100, 100 + len(test_labels), dtype=np.float32)
    labels = np.arange(8) % 4
    return ArraySource(DataSpec((1,), 4), train[:, None], labels, test[:, None], np.array(test_labels), labels + 10)


def test_some_classes_numbered_anew() -> None:
    """Class 3 becomes 0 and class 1 becomes 1; their samples are 1, 3, 5, 7, in the order of the set."""
    some = Selected(numbered_source([3, 2, 1, 3]), [3, 1])
    assert some.spec.classes == 2 and some.train_owner is not None
    assert some.train_labels.tolist() == [1, 0, 1, 0] and some.test_labels.tolist() == [0, 1, 0]
    assert some.train_owner.tolist() == [11, 13, 11, 13]
    x, y = some.take("train", np.array([3, 0]))
    assert (x[:, 0].tolist(), y.tolist(), y.dtype) == ([7.0, 1.0], [0, 1], torch.int64)
    x, y = some.take("test", np.array([1]))
    assert (x[:, 0].tolist(), y.tolist()) == ([102.0], [1])


@pytest.mark.parametrize(
    ("classes", "message"),
    [([0, 4], "below 4"), ([1, 1], "each once"), ([0, 2], "the test set has no sample of class 0")],
)
def test_classes_that_cannot_be_selected(classes: list[int], message: str) -> None:
    with pytest.raises(BadInput, match=rf"^data.only_classes: .*{message}"):
        Selected(numbered_source([3, 2, 1, 3]), classes)


# --- the real files, where they are ----------------------------------------------------------------------------------
REAL: list[tuple[Callable[..., Source], str]] = [
    (mnist, "MNIST"),
    (fashion_mnist, "FashionMNIST"),
    (cifar10, "cifar-10-batches-py"),
]
REAL_ROOT = Path(os.environ.get("MPIFED_DATA") or os.devnull)
if REAL_HERE := [(make, folder) for make, folder in REAL if (REAL_ROOT / folder).is_dir()]:

    @pytest.mark.parametrize(("make", "folder"), REAL_HERE)
    def test_real_files_have_the_published_sizes_and_statistics(make: Callable[..., Source], folder: str) -> None:
        """Fashion-MNIST and CIFAR-10 have equal classes; MNIST's training set has 5,421 fives and 6,742 ones."""
        source = make()
        counts = np.bincount(source.train_labels)
        if folder == "MNIST":
            assert (counts.sum(), counts.min(), counts.max()) == (60000, 5421, 6742)
            assert source.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
        else:
            assert (counts == (5000 if folder.startswith("cifar") else 6000)).all()
        assert len(source.test_labels) == 10000
        x = source.spec.standardise(source.take("train", np.arange(0, len(source.train_labels), 5))[0])
        for channel in x.unbind(dim=1):
            assert float(channel.mean()) == pytest.approx(0, abs=0.02)
            assert float(channel.std()) == pytest.approx(1, abs=0.02)
