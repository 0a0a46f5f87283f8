"""States in HDF5 files: a full disk is an error with a path, and reading follows and executes nothing in a file.

A file holds one group per state (`server`, `clients/17`), in it one dataset per tensor and one group per nested dict,
in order of insertion; and one dataset of bytes per record under `records`. Every dataset is contiguous and has no
filter; `bfloat16`, which HDF5 readers do not share, is stored as `int16` with the attribute `bfloat16`.

Only what this module writes is read back. Everything else that HDF5 can hold (links to other files, external and
virtual storage, filters, variable-length, compound and reference types) is refused before any data are read, and no
more is allocated than the file has bytes.
"""

from __future__ import annotations

import hashlib
import io
import math
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from h5py import h5, h5a, h5d, h5g, h5l, h5o, h5s, h5t
from torch import Tensor

from mpifed.errors import CheckpointError
from mpifed.types import State

RECORDS = "records"
MAX_DEPTH = 16
"""Groups inside one another: algorithms compose a few levels; a file with more is not ours."""

_MAPPED_BYTES = 1 << 18  # from this size on; a process may have some ten thousand mappings
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_BFLOAT16 = "bfloat16"
_DTYPES: dict[torch.dtype, np.dtype] = {
    getattr(torch, name): np.dtype(name)
    for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64")
    + ("uint8", "uint16", "uint32", "uint64", "bool")
}
_STORED = tuple((h5t.py_create(numpy_dtype), dtype) for dtype, numpy_dtype in _DTYPES.items())


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor for a state; a large one is a memory mapping, which is gone as soon as it is freed.

    On the heap, the states of many clients that come and go would leave holes between libhdf5's small blocks, which
    add up to more than the states.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


# --- writing ----------------------------------------------------------------------------------------------------------
def write_states(
    path: Path, states: Mapping[str, State] | Iterable[tuple[str, State]], records: Mapping[str, bytes]
) -> tuple[int, str]:
    """Write the states (by group name) and records to a new file at `path`, and bring it safely to disk.

    An iterable is consumed one state at a time, so that the states need not be in memory together. Returns the size
    in bytes and the SHA-256 (hex) of the file, computed from what was written. Raises `CheckpointError`, naming the
    path, where the disk is full or the folder cannot be written, or naming the tensor that cannot be stored.
    """
    with _writing(path) as sink:
        _write(sink, states, records)
        os.fsync(sink.fileno())
        sink.seek(0)
        digest = hashlib.file_digest(sink, "sha256").hexdigest()  # type: ignore[arg-type]
        return os.fstat(sink.fileno()).st_size, digest


def write_scratch(path: Path, group: str, state: State) -> None:
    """Write one state to a file that need not outlive the run: as `write_states`, with neither sync nor hash."""
    with _writing(path) as sink:
        _write(sink, [(group, state)], {})


class _Sink(io.FileIO):
    """A file that remembers its first error in place of raising it to libhdf5.

    libhdf5 cannot recover from a failed write: it keeps the dirty blocks, fails again when the file is closed, and may
    crash the process. Here it always succeeds; the writer looks at `error` and raises.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self.error is None:
                rest = rest[super().write(rest) :]  # the system writes at most 2 GiB at once
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return 0

    def check(self) -> None:
        if self.error is not None:
            raise self.error


@contextmanager
def _writing(path: Path) -> Iterator[_Sink]:
    try:
        with _Sink(path) as sink:
            yield sink
    except OSError as error:
        why = error.strerror or error
        raise CheckpointError(f"{path} cannot be written ({why}); free space there or choose another folder") from error


def _write(
    sink: _Sink, states: Mapping[str, State] | Iterable[tuple[str, State]], records: Mapping[str, bytes]
) -> None:
    try:
        with h5py.File(sink, "w", track_order=True) as file:
            for group, state in states.items() if isinstance(states, Mapping) else states:
                if group.split("/")[0] == RECORDS:
                    raise CheckpointError(f"no state can be called '{group}': '{RECORDS}' holds the records")
                _write_group(_make_groups(file, group, sink), state, sink)
            for name, data in records.items():
                parent = _make_groups(file, RECORDS, sink)
                parent.create_dataset(_checked(name, f"{sink.name}: {RECORDS}"), data=np.frombuffer(data, np.uint8))
                sink.check()
    finally:
        sink.check()  # what libhdf5 wrote as it closed; and the cause of whatever it raised after a failed write


def _make_groups(file: h5py.File, group: str, sink: _Sink) -> h5py.Group:
    parent = file
    for name in group.split("/"):
        _checked(name, f"{sink.name}: {group}")
        parent = parent[name] if name in parent else parent.create_group(name, track_order=True)
    return parent


def _write_group(group: h5py.Group, state: State, sink: _Sink) -> None:
    where = f"{sink.name}: {group.name}"
    if group.name.count("/") > MAX_DEPTH:
        raise CheckpointError(f"{where} is more than {MAX_DEPTH} groups deep; compose fewer states")
    for name, value in state.items():
        _checked(name, where)
        if isinstance(value, dict):
            _write_group(group.create_group(name, track_order=True), value, sink)
        elif isinstance(value, Tensor) and value.layout is torch.strided and value.dtype in _DTYPES:
            group.create_dataset(name, data=_array(value))
        elif isinstance(value, Tensor) and value.layout is torch.strided and value.dtype is torch.bfloat16:
            dataset = group.create_dataset(name, data=_array(value.view(torch.int16)))
            dataset.attrs[_BFLOAT16] = np.uint8(1)
        else:
            kind = f"{value.layout} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{where}/{name} cannot be stored ({kind}); states hold dense real tensors and dicts")
        sink.check()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _checked(name: str, where: str) -> str:
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise CheckpointError(f"{where} holds the name {name!r}; names are letters, digits, '_', '-' and '.'")
    return name


# --- reading ----------------------------------------------------------------------------------------------------------
def read_state(path: Path, group: str) -> State:
    """The state in that group (`server`, `clients/17`), bit for bit as written, in CPU memory.

    Raises `CheckpointError`, naming file and object, where the file is damaged or holds anything but plain tensors.
    """
    with _reading(path) as reader:
        return reader.state(reader.group(group), group)


def read_record(path: Path, name: str) -> bytes:
    """The bytes of that record. Raises as `read_state`."""
    with _reading(path) as reader:
        where = f"{RECORDS}/{name}"
        child = reader.child(reader.group(RECORDS), name, where)
        data = reader.tensor(child, where) if isinstance(child, h5d.DatasetID) else None
        if data is None or data.dtype is not torch.uint8 or data.ndim != 1:
            raise reader.refused(where, "is not a record (uint8 in one dimension)")
        return data.numpy().tobytes()


def list_groups(path: Path, group: str = "") -> list[str]:
    """Names of the groups directly inside `group` (of the file: `""`), as written. Raises as `read_state`."""
    with _reading(path) as reader:
        parent = reader.group(group)
        children = {name: reader.child(parent, name, f"{group}/{name}") for name in reader.names(parent)}
        return [name for name, child in children.items() if isinstance(child, h5g.GroupID)]


@contextmanager
def _reading(path: Path) -> Iterator[_Reader]:
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file; it is not read")
        # A finished file has no writer, and many cluster file systems do not know locks.
        with h5py.File(path, "r", locking=False) as file:
            yield _Reader(path, status.st_size, file.id)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:  # what h5py makes of libhdf5's errors
        why = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read ({why}); it is damaged, use another checkpoint") from error


class _Reader:
    """Reads from one open file, by hard links alone, every object once, and never more bytes than the file has."""

    def __init__(self, path: Path, size: int, root: h5py.h5f.FileID) -> None:
        self.path = path
        self.size = size
        self.bytes_left = size
        self.root = h5g.open(root, b"/")
        self.seen: set[int] = {h5o.get_info(self.root).addr}

    def refused(self, where: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {where} {why}; it is refused, use another checkpoint")

    def group(self, name: str) -> h5g.GroupID:
        current, where = self.root, ""
        for part in filter(None, name.split("/")):
            where = f"{where}/{part}".lstrip("/")
            current = self.child(current, part, where)
            if not isinstance(current, h5g.GroupID):
                raise self.refused(where, "is not a group")
        return current

    def names(self, group: h5g.GroupID) -> list[str]:
        """Names in a group in order of creation."""
        names: list[bytes] = []
        # append returns None, which lets the iteration go on
        group.links.iterate(names.append, idx_type=h5.INDEX_CRT_ORDER, order=h5.ITER_INC)
        return [name.decode("utf-8", "backslashreplace") for name in names]

    def child(self, group: h5g.GroupID, name: str, where: str) -> h5g.GroupID | h5d.DatasetID:
        """The object of that name, opened only if a hard link leads to it and no other did before."""
        _checked(name, str(self.path))
        if not group.links.exists(name.encode()):
            raise CheckpointError(f"{self.path} holds no '{where}'; use another checkpoint")
        kind = group.links.get_info(name.encode()).type
        if kind != h5l.TYPE_HARD:
            names = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link"}
            raise self.refused(where, f"is {names.get(kind, 'a link of an unknown kind')}")
        child = h5o.open(group, name.encode())
        if not isinstance(child, h5g.GroupID | h5d.DatasetID):
            raise self.refused(where, "is neither a group nor a dataset")
        address = h5o.get_info(child).addr
        if address in self.seen:
            raise self.refused(where, "is linked more than once")
        self.seen.add(address)
        return child

    def state(self, group: h5g.GroupID, where: str) -> State:
        if where.count("/") >= MAX_DEPTH:
            raise self.refused(where, f"is more than {MAX_DEPTH} groups deep")
        state: State = {}
        for name in self.names(group):
            path = f"{where}/{name}"
            child = self.child(group, name, path)
            state[name] = self.state(child, path) if isinstance(child, h5g.GroupID) else self.tensor(child, path)
        return state

    def tensor(self, dataset: h5d.DatasetID, where: str) -> Tensor:
        created = dataset.get_create_plist()
        if created.get_layout() != h5d.CONTIGUOUS:  # the layout first: it names virtual storage
            names = {h5d.VIRTUAL: "virtual", h5d.CHUNKED: "chunked", h5d.COMPACT: "compact"}
            raise self.refused(where, f"has {names.get(created.get_layout(), 'unknown')} storage")
        if created.get_external_count():
            raise self.refused(where, "has external storage")
        if created.get_nfilters():
            raise self.refused(where, "has filters")

        stored = dataset.get_type()
        dtype = next((dtype for known, dtype in _STORED if stored.equal(known)), None)
        is_bfloat16 = h5a.exists(dataset, _BFLOAT16.encode())
        if dtype is None or (is_bfloat16 and dtype is not torch.int16):
            raise self.refused(where, "has a data type that no tensor is stored in")

        space = dataset.get_space()
        if space.get_simple_extent_type() not in (h5s.SCALAR, h5s.SIMPLE):
            raise self.refused(where, "has no shape")
        shape = space.shape
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self.bytes_left:
            raise self.refused(where, f"declares shape {shape}, more bytes than the file has")
        self.bytes_left -= nbytes
        tensor = empty(shape, dtype)
        if nbytes:
            offset = dataset.get_offset()
            if offset is None or offset + nbytes > self.size or dataset.get_storage_size() != nbytes:
                raise self.refused(where, f"declares shape {shape}, for which the file holds no data")
            dataset.read(h5s.ALL, h5s.ALL, tensor.numpy(), stored)
        return tensor.view(torch.bfloat16) if is_bfloat16 else tensor
