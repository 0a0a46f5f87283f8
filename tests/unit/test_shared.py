"""One copy of a data set a node: shared memory that leaves nothing behind, and sources that are read once."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpifed.comm.communicator import Communicator
from mpifed.comm.inprocess import run_ranks
from mpifed.data.idx import mnist
from mpifed.data.shared import Published, Unshareable, attach
from mpifed.data.source import ArraySource, Source
from mpifed.data.synthetic import Synthetic
from mpifed.errors import BadInput
from mpifed.federation import load as loading
from mpifed.federation.federation import Federation
from mpifed.federation.load import load
from mpifed.types import DataSpec
from tests.algorithm_table import job_of
from tests.unit.test_sources import write_idx

ARRAYS = {
    "view": np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(0, 2, 1),
    "labels": np.array([3, -1, 2**40]),
    "empty": np.empty((0, 5), np.float32),
    "number": np.array(2.5),
    "ids": np.arange(7, dtype=np.int32),
}
HERE = "tests.unit.test_shared"


# --- the memory -------------------------------------------------------------------------------------------------------
def in_another_process(where: dict[str, Any], program: str) -> subprocess.CompletedProcess[str]:
    """`program` in a process of its own, where `where` is what was published."""
    start = f"import json, mpifed.data.shared as shared\nwhere = json.loads({json.dumps(where)!r})\n"
    command = [sys.executable, "-c", start + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_another_process_sees_the_same_arrays_after_all_names_are_gone() -> None:
    published = Published(ARRAYS)
    where = json.loads(json.dumps(published.where))
    program = "found = shared.attach(where)\nprint({n: (a.tolist(), a.dtype.str, a.shape) for n, a in found.items()})"
    done = in_another_process(where, program)
    found = attach(where)
    published.close()
    assert done.stdout == str({n: (a.tolist(), a.dtype.str, a.shape) for n, a in ARRAYS.items()}) + "\n", done
    assert all(np.array_equal(found[name], array) for name, array in ARRAYS.items())


def test_nobody_can_write_into_them_or_make_them_shorter() -> None:
    published = Published(ARRAYS)
    found = attach(published.where)
    with pytest.raises(ValueError, match="read-only"):
        found["labels"][0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        found["labels"].flags.writeable = True
    descriptor = published.where["descriptor"]
    for act in (lambda: os.ftruncate(descriptor, 1), lambda: os.pwrite(descriptor, b"x", 0)):
        with pytest.raises(PermissionError):
            act()
    published.close()


def test_what_is_no_longer_there_or_is_something_else_is_not_taken_for_it() -> None:
    published, other = Published(ARRAYS), Published({"zeros": np.zeros(10_000)})
    where = published.where
    with pytest.raises(Unshareable, match=f"process {os.getpid()} is another one here"):
        attach(where | {"descriptor": other.where["descriptor"]})
    with pytest.raises(Unshareable, match="cannot be opened"):
        attach(where | {"pid": 2**22 + 1})
    published.close()
    other.close()
    with pytest.raises(Unshareable, match="cannot be opened"):
        attach(where)


def test_objects_are_not_shared() -> None:
    with pytest.raises(Unshareable, match="things holds Python objects"):
        Published({"things": np.array([{}], dtype=object)})


def test_too_little_memory_is_an_error_and_no_signal() -> None:
    """A limit on the size of files, which is one for this memory too, stands for memory that runs out."""
    before = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(Unshareable, match="bytes of shared memory are not to be had"):
            Published({"zeros": np.zeros(1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(os.listdir("/proc/self/fd")) == before


# --- the source -------------------------------------------------------------------------------------------------------
def photographs() -> ArraySource:
    """40 + 10 samples of two numbers."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (50, 2, 1, 1), dtype=np.uint8), np.arange(50) % 2
    return ArraySource(DataSpec((2, 1, 1), 2, (0.1, 0.2), (0.5, 0.6)), x[:40], y[:40], x[40:], y[40:], np.arange(40))


HOSTS = "abacb"


def read_by(comm: Communicator, make: Callable[[], Source]) -> Source:
    """`load` on ranks that have found out who shares a node with whom."""
    comm.find_nodes()
    return load(comm, make)


def test_it_is_read_once_a_node() -> None:
    read: list[int] = []

    def main(comm: Communicator) -> Source:
        def make() -> ArraySource:
            read.append(comm.rank)
            return photographs()

        return read_by(comm, make)

    expected = photographs()
    for source, host in zip(run_ranks(5, main, HOSTS), HOSTS, strict=True):
        assert isinstance(source, ArraySource) and source.spec == expected.spec
        for name, array in expected.arrays().items():
            assert np.array_equal(getattr(source, name), array) and getattr(source, name).dtype == array.dtype
        assert source.shared == (host != "c")  # c has one rank, which needs no other's
        x, y = source.take("train", np.array([5, 3]))
        x += 1  # a copy
        assert torch.equal(x - 1, expected.take("train", np.array([5, 3]))[0]) and y.tolist() == [1, 1]
    assert sorted(read) == [0, 1, 3]


def test_where_a_rank_sees_no_shared_memory_it_makes_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every rank but the first of b is as if in another container: it finds nobody under that number."""
    caplog.set_level("INFO")
    monkeypatch.setattr(loading, "attach", lambda where: attach(where | {"pid": 2**22 + 1}))
    sources = run_ranks(5, lambda comm: read_by(comm, photographs), HOSTS)
    expected = photographs()
    for source in sources:
        assert isinstance(source, ArraySource) and not source.shared
        assert np.array_equal(source.train_samples, expected.train_samples)
    [line] = caplog.messages
    assert line.startswith("data.share: ranks of one node keep a copy each of the data set: the memory of process")
    assert line.endswith(" on a")


def test_where_there_is_no_such_memory_every_rank_makes_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.delattr(os, "memfd_create")
    sources: list[Any] = run_ranks(3, lambda comm: read_by(comm, photographs), "aaa")
    assert [source.shared for source in sources] == [False] * 3
    assert len(caplog.messages) == 1 and "no anonymous shared memory" in caplog.messages[0]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_set_that_a_node_cannot_read_is_an_error_on_every_rank(bad: int) -> None:
    def main(comm: Communicator) -> str:
        def make() -> ArraySource:
            if comm.rank == bad:
                raise BadInput(f"data.root: rank {bad} finds nothing")
            return photographs()

        with pytest.raises(BadInput) as error:
            read_by(comm, make)
        return str(error.value)

    assert run_ranks(5, main, HOSTS) == [f"data.root: rank {bad} finds nothing"] * 5


def test_a_set_that_is_mapped_stays_so_and_one_that_holds_little_is_made_on_every_rank(tmp_path: Path) -> None:
    write_idx(tmp_path, "MNIST/raw", "train", "t10k")
    mapped: list[Any] = run_ranks(3, lambda comm: read_by(comm, lambda: mnist(root=str(tmp_path))), "aab")
    assert [(type(source.train_samples), source.shared) for source in mapped] == [
        (np.memmap, True),
        (np.memmap, True),
        (np.memmap, False),
    ]
    made: list[Any] = run_ranks(2, lambda comm: read_by(comm, lambda: Synthetic(samples=20)), "aa")
    assert all(type(source) is Synthetic for source in made)


# --- what a federation makes of it ------------------------------------------------------------------------------------
def photographs_of_shape(*, shape: tuple[int, ...] = (4,), seed: int = 0) -> ArraySource:
    """200 + 50 samples of 3 classes, float32: a data set of one's own."""
    rng = np.random.default_rng(seed)
    x, y = rng.random((250, *shape), dtype=np.float32), np.arange(250) % 3
    return ArraySource(DataSpec(tuple(shape), 3), x[:200], y[:200], x[200:], y[200:])


OWN = {"name": f"{HERE}:photographs_of_shape", "partition": {"name": "dirichlet", "alpha": 0.5, "min_size": 5}}
LAZY = {"name": "synthetic", "samples": 200, "test_samples": 50, "input_shape": [4], "classes": 3}


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize(
    "data",
    [
        OWN,
        OWN | {"only_classes": [2, 0]},
        OWN | {"public_held_out": 0.25},
        OWN | {"public": {"name": f"{HERE}:photographs_of_shape", "seed": 1}, "public_samples": 30},
        OWN | {"public": LAZY, "public_classes": "union", "public_samples": 30},
        LAZY | {"partition": OWN["partition"], "public": LAZY | {"seed": 3}},
    ],
    ids=["own", "only_classes", "held_out", "public", "lazy_public", "lazy"],
)
def test_the_same_samples_with_and_without(data: dict[str, Any], participation: float) -> None:
    """Clients, tests, own tests, the public set, on three ranks of which two test; and the hash of who has what."""

    def main(share: str, comm: Communicator) -> list[Any]:
        job = job_of(
            {"name": "local"}, data=data | {"share": share}, evaluate={"own": True}, participation=participation
        )
        federation = Federation.build(job, comm)
        federation.settle()
        found: list[Any] = [federation.partition.sha256]
        if comm.rank > 0:
            for client in federation.roster.deal(range(federation.clients)).by_rank[comm.rank]:
                found += [client, *federation.samples(client)]
            for x, y in [federation.test_set, *federation.own_tests().values()]:
                found += [*x.split(7), y]
        public = federation.env.public
        if public is not None:
            found += [public.labels, public.x(torch.tensor([3, 1, 4]))]
        return found

    shared, private = (run_ranks(3, partial(main, share)) for share in ("auto", "off"))
    for ours, theirs in zip(shared, private, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            if isinstance(one, torch.Tensor):
                assert one.dtype == other.dtype and one.is_contiguous() and torch.equal(one, other)
            else:
                assert one == other


def careless(labels: np.ndarray, clients: int, rng: np.random.Generator, test_labels: np.ndarray) -> Any:
    """A partition that changes what it was given."""
    labels[:] = 0


def test_who_writes_into_the_labels_is_told() -> None:
    """On the first rank, who read them, as on the other."""
    job = job_of({"name": "fedavg"}, data=OWN | {"partition": {"name": f"{HERE}:careless"}})

    def main(comm: Communicator) -> str:
        source = read_by(comm, job.data.make)
        with pytest.raises(ValueError, match="read-only") as error:
            job.data.partition.target(source.train_labels, 5, np.random.default_rng(), source.test_labels)
        return str(error.value)

    assert run_ranks(2, main, "aa") == ["assignment destination is read-only"] * 2
