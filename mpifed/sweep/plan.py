"""A sweep file: which jobs it stands for, what they are called, and which published numbers stand beside them.

`docs/sweeps.md` is the reference. Members are variants x grid points x seeds, in this order, so that their numbers stay
what they are while the file is not changed, and their names do even when values are added. Nothing here validates a
job, and so nothing imports torch: a report starts fast.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mpifed.component import explain, unknown_key
from mpifed.errors import BadInput
from mpifed.job import flatten, merge, parse
from mpifed.storage.run_folder import RunFolder, replacing, to_json

SNAPSHOT = "sweep.json"
"""The sweep as it was last run, its base job included: what makes a sweep folder readable without the sweep file."""

RESERVED = ("jobs", "logs", "report")
"""What else stands in a sweep's folder."""

LONGEST_NAME = 80
"""Characters; a longer name of a member is cut, and told apart by a part of its hash."""


# --- the file ---------------------------------------------------------------------------------------------------------
class _Table(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Variant(_Table):
    """`[[variant]]`: keys that go together, such as a method and its hyper-parameters; a row of the report."""

    label: str = Field(min_length=1, description="Its name in tables, figures and names of members.")
    set: dict[str, Any] = Field(default_factory=dict, description="Overrides: dotted keys and values.")
    ranks: int | None = Field(default=None, ge=1, description="MPI ranks of its members, instead of the sweep's.")
    bound: bool = Field(
        default=False, description="A bound, such as pooled training: a level line in figures, never marked as best."
    )


class Published(_Table):
    """`[[published]]`: somebody else's numbers, to stand beside ours."""

    source: str = Field(min_length=1, description="Where they are from: authors, year, table.")
    metric: str = Field(default="", description="The one metric beside which they stand; empty: every metric.")
    where: dict[str, Any] = Field(
        default_factory=dict, description="Values of the grid's other keys for which they hold; left out: for all."
    )
    values: dict[str, Any] = Field(
        description="By variant: a number or [mean, std], or a table of these by value of `columns`."
    )


def _some(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


class SweepFile(_Table):
    """The keys of a sweep file."""

    title: str = Field(default="", description="Heading of the report; empty: the file's name.")
    base: str = Field(default="", description="The job file that is varied, relative to the sweep file.")
    job: dict[str, Any] = Field(default_factory=dict, description="The job itself, instead of `base`.")
    out: str = Field(default="", description="Folder of the members; empty: `runs/` and the sweep file's name.")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, description="Values of `seed`, over which the report takes means; empty: the job's."
    )
    grid: dict[str, Any] = Field(
        default_factory=dict, description="Values of each dotted key; every combination is run."
    )
    variant: list[Variant] = Field(default_factory=list, description="Variants; every one is run on all of the grid.")
    columns: str = Field(default="", description="The key of the grid along the columns of a table; empty: the first.")
    metric: Annotated[list[str], BeforeValidator(_some)] = Field(
        default=["final"], min_length=1, description="What the tables show, one table for each."
    )
    published: Annotated[list[Published], BeforeValidator(_some)] = Field(
        default_factory=list, description="Published numbers."
    )
    ranks: int = Field(default=1, ge=1, description="MPI ranks of each member.")
    parallel: int = Field(default=1, ge=1, description="Members that run at once.")


# --- the members ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Member:
    """One job of a sweep: `overrides` by dotted key make `document`, the tables of its job, which nobody has validated.

    `point` has the value of every key of the grid; `seed` is None where the sweep leaves it to the job.
    """

    index: int
    name: str
    variant: str
    point: Mapping[str, Any]
    seed: int | None
    ranks: int
    overrides: Mapping[str, Any]
    document: Mapping[str, Any]
    folder: RunFolder


@dataclass(frozen=True)
class Sweep:
    """A sweep file that has been read: `settings`, the base job's tables, and the folder of the members.

    The constructor expands nothing; `members`, `columns` and `panels` do, and raise nothing after `read_sweep`.
    """

    name: str
    folder: Path
    settings: SweepFile
    base: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The heading of its report."""
        return self.settings.title or self.name

    @cached_property
    def grid(self) -> dict[str, list[Any]]:
        """Values by dotted key."""
        return dict(flatten(self.settings.grid))

    @cached_property
    def labels(self) -> dict[str, str]:
        """A short name for every key of the grid: its last part, with as much before it as tells the keys apart."""
        parts = {key: [part for part in key.split(".") if part != "name"] or [key] for key in self.grid}
        labels = {key: parts[key][-1] for key in self.grid}
        counts = Counter(labels.values())
        return {key: label if counts[label] == 1 else ".".join(parts[key][-2:]) for key, label in labels.items()}

    @cached_property
    def variants(self) -> list[Variant]:
        """The variants; of a sweep without any, the base job's algorithm is the only one."""
        algorithm = self.base.get("algorithm")
        name = algorithm.get("name") if isinstance(algorithm, dict) else None
        return self.settings.variant or [Variant(label=name if isinstance(name, str) else "fedavg")]

    @property
    def columns(self) -> str:
        """The key of the grid along the columns of a table; empty where there is no grid."""
        return self.settings.columns or next(iter(self.grid), "")

    @cached_property
    def panels(self) -> list[dict[str, Any]]:
        """Every combination of values of the keys that are not `columns`: a table each."""
        others = {key: values for key, values in self.grid.items() if key != self.columns}
        return [dict(zip(others, values, strict=True)) for values in itertools.product(*others.values())]

    @cached_property
    def members(self) -> list[Member]:
        """All members, in order of their index."""
        seeds: Sequence[int | None] = self.settings.seeds or [None]
        combinations = itertools.product(self.variants, itertools.product(*self.grid.values()), seeds)
        return [self._member(index, *combination) for index, combination in enumerate(combinations)]

    def _member(self, index: int, variant: Variant, values: tuple[Any, ...], seed: int | None) -> Member:
        point = dict(zip(self.grid, values, strict=True))
        name = self._name(variant, point, seed)
        folder = RunFolder(self.folder / name)
        overrides = dict(flatten(variant.set)) | point | ({} if seed is None else {"seed": seed})
        document = merge(self.base, overrides) | {"out": str(folder.path)}
        return Member(
            index, name, variant.label, point, seed, variant.ranks or self.settings.ranks, overrides, document, folder
        )

    def _name(self, variant: Variant, point: Mapping[str, Any], seed: int | None) -> str:
        parts = [_slug(variant.label)] if self.settings.variant else []
        parts += [_slug(f"{self.labels[key]}{shown(value)}") for key, value in point.items()]
        parts += [] if seed is None else [f"seed{seed}"]
        name = "-".join(parts) or "run"
        if len(name) <= LONGEST_NAME:
            return name
        return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

    def select(self, patterns: Sequence[str]) -> list[Member]:
        """The members whose names match one of the shell patterns; all for none. Raises `BadInput` for no match."""
        for pattern in patterns:
            if not any(fnmatchcase(member.name, pattern) for member in self.members):
                raise BadInput(f"--only: no member is called '{pattern}'; the first is '{self.members[0].name}'")
        return [
            member
            for member in self.members
            if not patterns or any(fnmatchcase(member.name, pattern) for pattern in patterns)
        ]

    def save(self) -> None:
        """Write `SNAPSHOT` into the sweep's folder, which has to exist."""
        settings = self.settings.model_dump(exclude_defaults=True) | {"base": "", "out": ""}
        text = to_json(settings | {"name": self.name, "job": self.base}, indent=2) + "\n"
        path = self.folder / SNAPSHOT
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with replacing(path) as draft:
                draft.write_text(text, encoding="utf-8")


def shown(value: Any) -> str:
    """A value of the grid as a name or a heading has it: `0.1`, `iid`, `200-200`, `true`."""
    if isinstance(value, dict):
        return "-".join(shown(item) for item in value.values())
    if isinstance(value, list):
        return "-".join(map(shown, value))
    return value if isinstance(value, str) else json.dumps(value)


def _slug(text: str) -> str:
    """Letters, digits and `. _ + -` of a text, other runs of characters as one `-`."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.") or "x"


# --- reading ----------------------------------------------------------------------------------------------------------
def is_sweep(path: str | Path) -> bool:
    """Whether a path is that of a sweep's folder, or of a TOML file with a key that sweeps have and jobs have not."""
    path = Path(path)
    if path.is_dir():
        return (path / SNAPSHOT).is_file()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: TOML, encoding
        return False
    return not document.keys().isdisjoint({"base", "job", "seeds", "grid", "variant"})


def read_sweep(path: str | Path, out: str = "") -> Sweep:
    """Read a sweep file, or the snapshot in a sweep's folder; `out` is another folder for the members.

    Raises `BadInput`, one line for each fault, naming the file and the key. Jobs are not validated.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / SNAPSHOT).is_file():
            raise BadInput(f"{path} is not the folder of a sweep (it holds no {SNAPSHOT}); give the sweep's TOML file")
        name, folder, document = _snapshot(path)
    else:
        document = _parsed(_text(path, "the sweep file"), path)
        name, folder = path.stem, Path("runs") / path.stem
    settings = _checked(document, path)
    if settings.base and settings.job:
        raise BadInput(f"{path}: base and [job] exclude each other; drop one")
    base: dict[str, Any] = dict(settings.job)
    if not settings.job:
        file = path.parent / settings.base
        base = parse(_text(file, "base:") if settings.base else None, str(file))
    chosen = out or settings.out
    sweep = Sweep(name, Path(chosen).expanduser() if chosen else folder, settings, base)
    faults = list(_faults(sweep))
    if faults:
        raise BadInput("\n".join(f"{path}: {fault}" for fault in faults))
    return sweep


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadInput(f"{what} {path} cannot be read: {reason}") from None


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise BadInput(f"{path} is not valid TOML: {error}") from None


def _snapshot(folder: Path) -> tuple[str, Path, dict[str, Any]]:
    path = folder / SNAPSHOT
    try:
        document = json.loads(_text(path, "the snapshot"))
        return str(document.pop("name")), folder, document
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        raise BadInput(f"{path} is damaged; give the sweep's TOML file instead") from None


def _checked(document: Mapping[str, Any], path: Path) -> SweepFile:
    try:
        # By way of JSON: there, strict means "the type as written". Dates become texts, which no key of a job takes.
        return SweepFile.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            if item["type"] == "extra_forbidden":
                raise BadInput(f"{path}: {_unknown(item['loc'])}") from None
        text = explain(error, lambda place: ".".join(map(str, place)))
        text = text.replace("but the job says", "but it says")
        raise BadInput("\n".join(f"{path}: {line}" for line in text.splitlines())) from None


def _unknown(place: tuple[int | str, ...]) -> BadInput:
    tables: dict[str, type[BaseModel]] = {"variant": Variant, "published": Published}
    owner = tables.get(str(place[0]), SweepFile)
    names = [part for part in place if isinstance(part, str)]
    return unknown_key(".".join(names), owner.model_fields, "a sweep" if owner is SweepFile else f"[[{place[0]}]]")


def _faults(sweep: Sweep) -> Iterator[str]:
    """What is wrong with a sweep beyond the types of its keys."""
    settings = sweep.settings
    for key, values in sweep.grid.items():
        if not isinstance(values, list) or not values:
            yield f"grid.{key}: must be an array of values, but it says {json.dumps(values)}"
    if settings.columns and settings.columns not in sweep.grid:
        yield f"columns: '{settings.columns}' is not a key of the grid; its keys: {', '.join(sweep.grid) or 'none'}"
    yield from (f"variant.label: '{label}' is there twice" for label in _twice(v.label for v in settings.variant))
    yield from (f"seeds: {seed} is there twice" for seed in _twice(settings.seeds))
    for place, keys in [("grid", list(sweep.grid)), *((f"variant {v.label}", _keys(v)) for v in settings.variant)]:
        if "out" in keys:
            yield f"{place}: `out` is given to each member by the sweep"
        if "seed" in keys and settings.seeds:
            yield f"{place}: `seed` is set by `seeds`"
        if place != "grid":
            yield from (f"{place}: `{key}` is set by the grid as well" for key in keys if key in sweep.grid)
    if any(not isinstance(values, list) for values in sweep.grid.values()):
        return
    try:
        names = [member.name for member in sweep.members]
    except BadInput as error:  # a table that is overridden as a whole and in part
        yield str(error)
        return
    yield from (f"no member can be called '{name}'; use another label" for name in names if name in RESERVED)
    yield from (f"two members would be called '{name}'; use other labels or values" for name in _twice(names))
    yield from _published_faults(sweep)


def _keys(variant: Variant) -> list[str]:
    return [key for key, _ in flatten(variant.set)]


_T = TypeVar("_T")


def _twice(items: Iterator[_T] | Sequence[_T]) -> list[_T]:
    return [item for item, count in Counter(items).items() if count > 1]


# --- published numbers ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Number:
    """A published number as it is printed: `mean`, and `std` where there is one."""

    mean: float
    std: float | None


def published(sweep: Sweep, table: Published, variant: str, column: Any) -> Number | None:
    """The number for a variant and a value of `columns` (None: no grid); None where the table has none."""
    row = table.values.get(variant)
    if isinstance(row, dict):
        row = next((value for text, value in row.items() if text == shown(column)), None)
    if row is None:
        return None
    mean, std = row if isinstance(row, list) else (row, None)
    return Number(mean, std)


def _published_faults(sweep: Sweep) -> Iterator[str]:
    """Numbers that would stand nowhere, which is what a slip of the pen looks like."""
    labels = [variant.label for variant in sweep.variants]
    columns = [shown(value) for value in sweep.grid.get(sweep.columns, [])]
    for table in sweep.settings.published:
        for variant, row in table.values.items():
            if variant not in labels:
                yield f"published: '{variant}' is not a variant; they are: {', '.join(labels)}"
            cells = row.items() if isinstance(row, dict) else [("", row)]
            for column, value in cells:
                if isinstance(row, dict) and column not in columns:
                    yield f"published: {variant}: '{column}' is not a value of {sweep.columns or 'a grid'}: " + (
                        ", ".join(columns) or "there is none"
                    )
                if not _is_number(value):
                    yield f"published: {variant}: must be a number or [mean, std], but it says {json.dumps(value)}"
        for key, value in table.where.items():
            if key not in sweep.grid or value not in sweep.grid[key]:
                yield f"published.where: {key} = {json.dumps(value)} is nowhere in the grid"
        if table.metric and table.metric not in sweep.settings.metric:
            yield f"published.metric: '{table.metric}' is not a metric of the sweep: {', '.join(sweep.settings.metric)}"


def _is_number(value: Any) -> bool:
    pair = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(isinstance(item, int | float) and not isinstance(item, bool) for item in pair)
