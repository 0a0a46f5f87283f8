"""`run.h5`: what a run leaves for analysis, in plain HDF5 columns that any tool reads.

No variable-length and no object types, no filters, no links: a reader can check the size of everything before it
reads anything. Strings are fixed-length bytes; what has no fixed shape is JSON in a `uint8` data set.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

import mpifed
from mpifed.errors import BadInput
from mpifed.storage.run_folder import replacing, to_json

Column = npt.NDArray[Any]

VERSION = 1
"""Of the format; a reader refuses others."""

LEDGER = {
    "round": "int32",
    "phase": "S",
    "direction": "S",
    "kind": "S",
    "rank": "int32",
    "logical": "int64",
    "mpi_sent": "int64",
    "mpi_received": "int64",
}
WIRE = {
    "round": "int32",
    "phase": "S",
    "direction": "S",
    "rank": "int32",
    "sent": "int64",
    "received": "int64",
    "retransmitted": "int64",
    "kind": "S",
}
WIRE_FLOWS = {"direction": "S", "sender": "int32", "receiver": "int32", "sent": "int64"}
RANK_TIMES = {
    "round": "int32",
    "rank": "int32",
    "train": "float64",
    "wait": "float64",
    "communicate": "float64",
    "evaluate": "float64",
    "server": "float64",
}
GROUPS = ("metrics", "ledger", "wire", "wire_flows", "partition", "provenance", "rank_times")


@dataclass(frozen=True)
class PartitionRecord:
    """Who holds what: sample indices per client, and how many samples of each class.

    `train` and `test`: one int64 array of indices into the data set per client; `test` is None where clients have no
    test samples of their own. `histogram`: int64 `[clients, classes]` of the training labels.
    """

    train: Sequence[npt.NDArray[np.int64]]
    histogram: npt.NDArray[np.int64]
    sha256: str
    test: Sequence[npt.NDArray[np.int64]] | None = None


@dataclass(frozen=True)
class Record:
    """The content of `run.h5`.

    `metrics`: per name a float64 column `[rounds]` (NaN: not measured in that round), or a list of JSON values.
    `ledger`, `wire`, `wire_flows`, `rank_times`: columns by name, strings as `str` arrays. `provenance`: attributes and
    lists by name.
    """

    metrics: dict[str, Column | list[Any]] = field(default_factory=dict)
    ledger: dict[str, Column] = field(default_factory=dict)
    partition: PartitionRecord | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    rank_times: dict[str, Column] = field(default_factory=dict)
    wire: dict[str, Column] = field(default_factory=dict)
    wire_flows: dict[str, Column] = field(default_factory=dict)


def software_versions() -> dict[str, str]:
    """Versions of mpifed, Python and the libraries that a result depends on, for `provenance`."""
    libraries = ("torch", "numpy", "mpi4py", "h5py")
    return {"mpifed": mpifed.__version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in libraries
    }


# --- writing ----------------------------------------------------------------------------------------------------------
def write_record(
    path: str | Path,
    metrics_rows: Sequence[Mapping[str, Any]],
    ledger: Mapping[str, Sequence[Any]],
    partition: PartitionRecord | None,
    provenance: Mapping[str, Any],
    rank_times: Sequence[Sequence[float]],
    wire: Mapping[str, Sequence[Any]] | None = None,
    wire_flows: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Write `run.h5`, whole or not at all; an existing one is replaced.

    Args:
        metrics_rows: one row a round, as in `metrics.jsonl`.
        ledger: the columns named in `LEDGER` (`mpifed.comm.ledger.Ledger.columns`), one entry per round, phase,
            direction, kind and rank; sizes in bytes.
        provenance: strings and numbers by name (attributes), and lists (JSON).
        rank_times: one row per round and rank, in the order of `RANK_TIMES`; seconds.
        wire, wire_flows: the columns named in `WIRE` and `WIRE_FLOWS` (`mpifed.comm.ledger.WireLedger`); bytes.
    """
    with replacing(Path(path)) as draft, h5py.File(draft, "w", libver="v110") as file:
        file.attrs["version"] = VERSION
        _write_metrics(file.create_group("metrics"), metrics_rows)
        _write_columns(file.create_group("ledger"), ledger, LEDGER)
        for name, columns, dtypes in (("wire", wire, WIRE), ("wire_flows", wire_flows, WIRE_FLOWS)):
            _write_columns(file.create_group(name), columns or dict.fromkeys(dtypes, ()), dtypes)
        if partition is not None:
            _write_partition(file.create_group("partition"), partition)
        _write_provenance(file.create_group("provenance"), provenance)
        times = zip(*rank_times, strict=True) if len(rank_times) else [()] * len(RANK_TIMES)
        _write_columns(file.create_group("rank_times"), dict(zip(RANK_TIMES, times, strict=True)), RANK_TIMES)


def _json_bytes(value: Any) -> npt.NDArray[np.uint8]:
    return np.frombuffer(to_json(value).encode(), np.uint8)


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"bytes": {"logical": {"up": 1}}}` -> `{"bytes.logical.up": 1}`; HDF5 reserves `/`."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        path = prefix + str(name).replace("/", ".")
        if isinstance(value, Mapping):
            flat |= _flat(value, path + ".")
        else:
            flat[path] = value
    return flat


def _write_metrics(group: h5py.Group, rows: Sequence[Mapping[str, Any]]) -> None:
    flat = [_flat(row) for row in rows]
    for name in dict.fromkeys(name for row in flat for name in row):
        values = [row.get(name) for row in flat]
        if all(value is None or isinstance(value, int | float | np.number) for value in values):
            group[name] = np.array([np.nan if value is None else value for value in values], np.float64)
        else:
            group[name] = _json_bytes(values)


def _write_columns(group: h5py.Group, columns: Mapping[str, Sequence[Any]], dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        if dtype == "S":
            texts = [str(value).encode("ascii") for value in columns[name]]
            group[name] = np.array(texts, f"S{max([1, *map(len, texts)])}")
        else:
            group[name] = np.asarray(columns[name], dtype)


def _write_partition(group: h5py.Group, partition: PartitionRecord) -> None:
    group.attrs["sha256"] = np.bytes_(partition.sha256)
    group["histogram"] = np.asarray(partition.histogram, np.int64)
    group["train_sizes"] = np.array([len(indices) for indices in partition.train], np.int64)
    for name, parts in (("train", partition.train), ("test", partition.test)):
        if parts is not None:
            group[f"{name}_indices"] = np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)
            group[f"{name}_offsets"] = np.cumsum([0, *map(len, parts)], dtype=np.int64)


def _write_provenance(group: h5py.Group, provenance: Mapping[str, Any]) -> None:
    for name, value in provenance.items():
        if isinstance(value, list | tuple | Mapping):  # a list of host names outgrows an attribute's 64 KiB
            group[name] = _json_bytes(value)
        elif isinstance(value, str):
            group.attrs[name] = np.bytes_(value.encode() or b" ")
        elif value is not None:
            group.attrs[name] = value


# --- reading ----------------------------------------------------------------------------------------------------------
def read_record(path: str | Path) -> Record:
    """Read `run.h5`; follows no link and allocates no more than the file's own size per data set.

    Raises `BadInput` naming the file and the object where it is damaged, or holds what `write_record` never writes.
    """
    path = Path(path)
    try:
        limit = path.stat().st_size
        with h5py.File(path, "r") as file:
            version = _attributes(file).get("version")
            if version != VERSION:
                raise _Refused(f"its format is version {version}, not {VERSION}")
            content = {name: _read_group(file, name, limit) for name in GROUPS}
            columns = {name: part[0] for name, part in content.items()}
            return Record(
                metrics={
                    name: _from_json(value) if value.dtype == np.uint8 else value
                    for name, value in columns["metrics"].items()
                },
                ledger=_known_columns(columns["ledger"], LEDGER),
                partition=_read_partition(*content["partition"]),
                provenance=content["provenance"][1]
                | {name: _from_json(value) for name, value in columns["provenance"].items()},
                rank_times=_known_columns(columns["rank_times"], RANK_TIMES),
                # a record of before there were wire bytes has none, or has them without kinds
                wire=_known_columns(_with_kinds(columns["wire"]), WIRE) if columns["wire"] else {},
                wire_flows=_known_columns(columns["wire_flows"], WIRE_FLOWS) if columns["wire_flows"] else {},
            )
    except _Refused as error:
        raise BadInput(f"{path}: {error}; use the run.h5 that the run wrote") from None
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise BadInput(
            f"{path}: damaged ({type(error).__name__}: {error}); use the run.h5 that the run wrote"
        ) from None


class _Refused(Exception):
    """What a record never holds."""


def _read_group(file: h5py.File, name: str, limit: int) -> tuple[dict[str, Column], dict[str, Any]]:
    """The data sets and attributes of one group; a group that is not there is empty."""
    if name not in list(file):  # `name in file` would follow a link
        return {}, {}
    _require_hard_link(file, name)
    group = file[name]
    if not isinstance(group, h5py.Group):
        raise _Refused(f"/{name} is not a group")
    columns = {}
    for child in group:
        _require_hard_link(group, child)
        dataset = group[child]
        where = f"/{name}/{child}"
        if not isinstance(dataset, h5py.Dataset):
            raise _Refused(f"{where} is not a data set")
        if dataset.is_virtual or dataset.external is not None:
            raise _Refused(f"{where} stores its values in another file")
        if dataset.chunks is not None or dataset.dtype.kind not in "iufS":
            raise _Refused(f"{where} is not a plain array of numbers or bytes")
        if dataset.nbytes > limit:
            raise _Refused(f"{where} claims {dataset.nbytes} bytes in a file of {limit}")
        columns[child] = dataset[()]
    return columns, _attributes(group)


def _require_hard_link(group: h5py.Group, name: str) -> None:
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise _Refused(f"{group.name.rstrip('/')}/{name} is a link")


def _attributes(group: h5py.Group) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in group.attrs:
        identifier = group.attrs.get_id(name)
        if identifier.dtype.kind not in "iufbS" or identifier.shape != ():
            raise _Refused(f"attribute {name} of {group.name} is not a number or a string")
        value = group.attrs[name]
        values[name] = value.decode(errors="replace").strip() if isinstance(value, bytes) else value.item()
    return values


def _from_json(value: Column) -> Any:
    return json.loads(value.tobytes())


def _known_columns(columns: dict[str, Column], known: Mapping[str, str]) -> dict[str, Column]:
    """The columns in order, strings decoded, all of one length."""
    found = {}
    for name, dtype in known.items():
        column = columns[name]
        found[name] = np.char.decode(column, "ascii") if dtype == "S" else column.astype(dtype, casting="safe")
    if len({column.shape for column in found.values()}) != 1 or column.ndim != 1:
        raise _Refused("its columns differ in length")
    return found


def _with_kinds(wire: dict[str, Column]) -> dict[str, Column]:
    return {"kind": np.zeros(len(wire["round"]), "S1")} | wire


def _read_partition(columns: dict[str, Column], attributes: dict[str, Any]) -> PartitionRecord | None:
    if not columns:
        return None
    train = np.split(columns["train_indices"], columns["train_offsets"][1:-1])
    test = None
    if "test_indices" in columns:
        test = np.split(columns["test_indices"], columns["test_offsets"][1:-1])
    histogram = columns["histogram"]
    if histogram.dtype != np.int64 or histogram.ndim != 2 or len(histogram) != len(train) or (histogram < 0).any():
        raise _Refused("/partition/histogram does not hold counts, one row a client")
    return PartitionRecord(train=train, histogram=histogram, sha256=str(attributes["sha256"]), test=test)
