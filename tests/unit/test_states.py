"""States in HDF5: bit for bit what was written; and nothing else that a file can hold is read."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpifed.errors import CheckpointError
from mpifed.storage.states import MAX_DEPTH, list_groups, read_record, read_state, write_scratch, write_states
from mpifed.types import State

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES += [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def bits(state: State) -> object:
    """All that a round trip has to keep: names in order, nesting, shapes, dtypes and every bit."""
    return [
        (name, bits(value))
        if isinstance(value, dict)
        else (name, value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, value in state.items()
    ]


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], raw: bytes) -> torch.Tensor:
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    data = (raw * (size // max(len(raw), 1) + 1))[:size]
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).view(shape)


# --- round trip ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_returns_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state: State = {"x": tensor_of(dtype, shape, b"\x01\x80\xff\x7f\xfe\x00\xc0")}
    write_states(tmp_path / "s.h5", {"server": state}, {})
    assert bits(read_state(tmp_path / "s.h5", "server")) == bits(state)


def test_bool_nan_payload_and_negative_zero_return_bit_for_bit(tmp_path: Path) -> None:
    """0x7fc12345 is a quiet NaN with payload, 0x7f812345 a signalling one, 0x80000000 is -0.0."""
    patterns = torch.tensor([0x7FC12345, 0x7F812345, -0x80000000, 0x00000001], dtype=torch.int32)
    state: State = {"f": patterns.view(torch.float32), "b": torch.tensor([True, False, True])}
    write_states(tmp_path / "s.h5", {"server": state}, {})
    back = read_state(tmp_path / "s.h5", "server")
    assert isinstance(back["f"], torch.Tensor) and torch.equal(back["f"].view(torch.int32), patterns)
    assert isinstance(back["b"], torch.Tensor) and back["b"].tolist() == [True, False, True]


def test_order_nesting_and_empty_dicts_are_kept(tmp_path: Path) -> None:
    state: State = {"z": torch.ones(1), "a": {"empty": {}, "2": torch.ones(()), "1": torch.ones(())}, "m": {}}
    state |= {f"k{9 - i}": torch.tensor(i) for i in range(10)}  # more than fit into a compact group
    write_states(tmp_path / "s.h5", {"server": state, "clients/7": {}}, {})
    assert bits(read_state(tmp_path / "s.h5", "server")) == bits(state)
    assert read_state(tmp_path / "s.h5", "clients/7") == {}


def test_views_gradients_and_strides_are_stored_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    state: State = {"t": base.T, "e": torch.ones(1).expand(5), "g": base.clone().requires_grad_()}
    write_states(tmp_path / "s.h5", {"server": state}, {})
    back = read_state(tmp_path / "s.h5", "server")
    assert bits(back) == bits({name: value.detach() for name, value in state.items()})  # type: ignore[union-attr]


_leaf = st.builds(
    tensor_of,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.binary(min_size=1, max_size=16),
)
_names = st.text("abcXYZ019_-", min_size=1, max_size=8)
_state = st.recursive(
    st.dictionaries(_names, _leaf, max_size=4),
    lambda inner: st.dictionaries(_names, st.one_of(_leaf, inner), max_size=4),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=_state)
def test_any_state_returns_bit_for_bit(tmp_path: Path, state: State) -> None:
    write_scratch(tmp_path / "s.h5", "server", state)
    assert bits(read_state(tmp_path / "s.h5", "server")) == bits(state)


def test_size_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    size, digest = write_states(tmp_path / "s.h5", {"server": {"x": torch.ones(1000)}}, {"metrics": b"[]"})
    data = (tmp_path / "s.h5").read_bytes()
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())


def test_states_of_an_iterable_are_written_one_at_a_time(tmp_path: Path) -> None:
    """When the second state is asked for, the 400,000 bytes of the first have left for the file."""
    path = tmp_path / "s.h5"
    sizes: list[int] = []

    def clients() -> Iterator[tuple[str, State]]:
        yield "clients/5", {"x": torch.ones(100_000)}
        sizes.append(path.stat().st_size)
        yield "clients/3", {"x": torch.ones(1)}

    write_states(path, clients(), {})
    assert sizes[0] >= 400_000
    assert list_groups(path) == ["clients"]
    assert list_groups(path, "clients") == ["5", "3"]


@pytest.mark.parametrize("data", [b"", b"\x00", b'{"a": 1}' * 1000])
def test_records_return_byte_for_byte(tmp_path: Path, data: bytes) -> None:
    write_states(tmp_path / "s.h5", {}, {"metrics": b"other", "ledger": data})
    assert read_record(tmp_path / "s.h5", "ledger") == data


# --- what is not written ---------------------------------------------------------------------------------------------
def _deep(levels: int) -> State:
    state: State = {}
    for _ in range(levels):
        state = {"d": state}
    return state


@pytest.mark.parametrize(
    "state",
    [
        {"a/b": torch.ones(1)},
        {"..": torch.ones(1)},
        {"": torch.ones(1)},
        {"c": torch.ones(1, dtype=torch.complex64)},
        {"s": torch.ones(2, 2).to_sparse()},
        {"n": 3},
        _deep(MAX_DEPTH + 1),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, state: State) -> None:
    with pytest.raises(CheckpointError, match="s.h5"):
        write_states(tmp_path / "s.h5", {"server": state}, {})


def test_the_deepest_state_that_is_written_is_read(tmp_path: Path) -> None:
    state = _deep(MAX_DEPTH - 1)
    write_states(tmp_path / "s.h5", {"server": state}, {})
    assert read_state(tmp_path / "s.h5", "server") == state


def test_a_state_cannot_be_called_records(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="records"):
        write_states(tmp_path / "s.h5", {"records": {}}, {})


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/s\.h5 cannot be written"):
        write_states(tmp_path / "file" / "s.h5", {}, {})


DISK_FULL = """
import os, resource, signal, sys, torch
from pathlib import Path
from mpifed.errors import CheckpointError
from mpifed.storage.states import write_states
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
state = {f"x{i}": torch.ones(500) for i in range(100)} | {"large": torch.ones(50_000)}
size, _ = write_states(path, {"server": state}, {})
opened = len(os.listdir("/proc/self/fd"))
for limit in (0, 1, 100, 5_000, 100_000, 220_000, 300_000, size - 4096, size - 1, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_states(path, {"server": state}, {})
        print("written", limit == size)
    except CheckpointError as error:
        print("refused", str(path) in str(error) and "File too large" in str(error))
print("descriptors", len(os.listdir("/proc/self/fd")) == opened)
"""


def test_a_full_disk_is_an_error_with_the_path_at_whatever_byte(tmp_path: Path) -> None:
    """Run in a process of its own: libhdf5 left alone with a full disk crashes when the file is closed."""
    command = [sys.executable, "-c", DISK_FULL, str(tmp_path / "full.h5")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["refused True"] * 9 + ["written True", "descriptors True"]
    assert done.returncode == 0


# --- what is not read ------------------------------------------------------------------------------------------------
def _external_link(file: h5py.File, folder: Path) -> None:
    write_states(folder / "other.h5", {"server": {"x": torch.ones(1)}}, {})
    file["server"]["x"] = h5py.ExternalLink(str(folder / "other.h5"), "/server/x")


def _external_link_as_the_group(file: h5py.File, folder: Path) -> None:
    write_states(folder / "other.h5", {"server": {"x": torch.ones(1)}}, {})
    del file["server"]
    file["server"] = h5py.ExternalLink(str(folder / "other.h5"), "/server")


def _soft_link(file: h5py.File, folder: Path) -> None:
    file["secret"] = np.ones(3)
    file["server"]["x"] = h5py.SoftLink("/secret")


def _hard_link_twice(file: h5py.File, folder: Path) -> None:
    file["server"]["x"] = np.ones(3)
    file["server"]["y"] = file["server"]["x"]


def _cycle(file: h5py.File, folder: Path) -> None:
    file["server"]["x"] = file["server"]


def _virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (3,))
    file["server"].create_virtual_dataset("x", layout)


def _external_storage(file: h5py.File, folder: Path) -> None:
    (folder / "secret").write_bytes(b"password" * 3)
    file["server"].create_dataset("x", (24,), "u1", external=[(str(folder / "secret"), 0, 24)])


def _variable_length_string(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", data="text", dtype=h5py.string_dtype())


def _variable_length_array(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", (2,), h5py.vlen_dtype(np.int32))


def _reference(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", data=file["server"].ref, dtype=h5py.ref_dtype)


def _compound(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", data=np.zeros(2, [("a", "f4"), ("b", "i4")]))


def _pickled(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", data=np.void(pickle.dumps([1, 2])))


def _big_endian(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", data=np.ones(3, ">f4"))


def _marked_bfloat16(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", data=np.ones(3, "f4")).attrs["bfloat16"] = 1


def _filtered(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", data=np.zeros(10**6, "f4"), compression="gzip")


def _chunked(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", (10**12,), "f4", chunks=(100,))


def _huge(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", (2**40,), "f4")


def _never_written(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", (8,), "f4")


def _no_shape(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", data=h5py.Empty("f4"))


def _impossible_empty(file: h5py.File, folder: Path) -> None:
    file["server"].create_dataset("x", (0, 2**40, 2**40), "f4")


def _named_type(file: h5py.File, folder: Path) -> None:
    file["server"]["x"] = np.dtype("f4")


def _too_deep(file: h5py.File, folder: Path) -> None:
    group = file["server"]
    for _ in range(MAX_DEPTH + 1):
        group = group.create_group("d", track_order=True)


def _dots(file: h5py.File, folder: Path) -> None:
    file["server"][".."] = np.ones(3)


def _unprintable(file: h5py.File, folder: Path) -> None:
    file["server"]["a\nb"] = np.ones(3)


def _order_not_tracked(file: h5py.File, folder: Path) -> None:
    del file["server"]
    file.create_group("server", track_order=False)["x"] = np.ones(3)


MALICIOUS = [
    (_external_link, "external link"),
    (_external_link_as_the_group, "external link"),
    (_soft_link, "soft link"),
    (_hard_link_twice, "linked more than once"),
    (_cycle, "linked more than once"),
    (_virtual, "virtual storage"),
    (_external_storage, "external storage"),
    (_variable_length_string, "data type"),
    (_variable_length_array, "data type"),
    (_reference, "data type"),
    (_compound, "data type"),
    (_pickled, "data type"),
    (_big_endian, "data type"),
    (_marked_bfloat16, "data type"),
    (_filtered, "chunked storage"),
    (_chunked, "chunked storage"),
    (_huge, "more bytes than the file has"),
    (_never_written, "holds no data"),
    (_no_shape, "no shape"),
    (_impossible_empty, "cannot be read"),
    (_named_type, "neither a group nor a dataset"),
    (_too_deep, "groups deep"),
    (_dots, "holds the name '..'"),
    (_unprintable, r"holds the name 'a\nb'"),
    (_order_not_tracked, "cannot be read"),
]


@pytest.mark.parametrize(("poison", "why"), MALICIOUS, ids=lambda value: getattr(value, "__name__", ""))
def test_malicious_files_are_refused(tmp_path: Path, poison: Callable[[h5py.File, Path], None], why: str) -> None:
    path = tmp_path / "bad.h5"
    with h5py.File(path, "w", track_order=True) as file:
        file.create_group("server", track_order=True)
        poison(file, tmp_path)
    with pytest.raises(CheckpointError) as refused:
        read_state(path, "server")
    assert why in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("poison", "target"), [(_virtual, "other.h5"), (_external_storage, "secret")])
def test_what_a_file_points_at_is_never_opened(
    tmp_path: Path, poison: Callable[[h5py.File, Path], None], target: str
) -> None:
    """The target is a pipe that nobody writes to: opening it would wait for ever."""
    with h5py.File(tmp_path / "bad.h5", "w", track_order=True) as file:
        file.create_group("server", track_order=True)
        poison(file, tmp_path)
    (tmp_path / target).unlink(missing_ok=True)
    os.mkfifo(tmp_path / target)
    with pytest.raises(CheckpointError):
        read_state(tmp_path / "bad.h5", "server")


def test_datasets_that_share_bytes_are_not_read_beyond_the_file(tmp_path: Path) -> None:
    """Two datasets of 40,000 bytes at the same offset of a file of some 42,000: together more than it has.

    A dataset that was never written has the address 2^64 - 1 in its layout message (version 3, class 1: contiguous),
    which is overwritten here with the address of the other.
    """
    path = tmp_path / "bad.h5"
    with h5py.File(path, "w", track_order=True) as file:
        server = file.create_group("server", track_order=True)
        server.create_dataset("x", data=np.ones(10_000, "f4"))
        server.create_dataset("y", (10_000,), "f4")
    with h5py.File(path, "r") as file:
        offset = file["server/x"].id.get_offset()
    data = path.read_bytes()
    never = b"\x03\x01" + b"\xff" * 8
    assert data.count(never) == 1 and len(data) < 80_000
    path.write_bytes(data.replace(never, never[:2] + offset.to_bytes(8, "little")))
    with h5py.File(path, "r") as file:
        assert file["server/y"][0] == 1
    with pytest.raises(CheckpointError, match="server/y .* more bytes than the file has"):
        read_state(path, "server")


@pytest.mark.parametrize("group", ["../server", "server/..", "server/.", "clients/1", "server/x", "/etc/passwd"])
def test_groups_that_are_not_there_are_named(tmp_path: Path, group: str) -> None:
    write_states(tmp_path / "s.h5", {"server": {"x": torch.ones(1)}}, {})
    with pytest.raises(CheckpointError, match=r"s\.h5"):
        read_state(tmp_path / "s.h5", group)


def test_a_record_has_to_be_bytes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "s.h5", "w", track_order=True) as file:
        records = file.create_group("records", track_order=True)
        records["floats"] = np.ones(3)
        records.create_group("group")
    for name in ("floats", "group", "missing"):
        with pytest.raises(CheckpointError, match=name):
            read_record(tmp_path / "s.h5", name)


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 500, 1000, -8, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    write_states(tmp_path / "s.h5", {"server": {"x": torch.ones(100), "y": {"z": torch.ones(3)}}}, {})
    (tmp_path / "torn.h5").write_bytes((tmp_path / "s.h5").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"torn\.h5"):
        read_state(tmp_path / "torn.h5", "server")


def test_what_is_no_hdf5_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pickled.h5").write_bytes(pickle.dumps({"server": [1]}))
    write_states(tmp_path / "s.h5", {"server": {}}, {})
    (tmp_path / "link.h5").symlink_to(tmp_path / "s.h5")
    for name in ("pickled.h5", "link.h5", "missing.h5", "."):
        with pytest.raises(CheckpointError):
            read_state(tmp_path / name, "server")
