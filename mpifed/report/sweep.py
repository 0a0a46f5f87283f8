"""The results of a sweep: means and standard deviations over seeds, beside published numbers; what is missing is said.

Only complete members of the sweep's own jobs count. Standard deviations are those of the population (divided by n).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpifed.errors import BadInput
from mpifed.progress import megabytes
from mpifed.report.layout import RENDER, Cell, Form, Table
from mpifed.report.runs import Run, column_value, read_run
from mpifed.storage.summary import LAST
from mpifed.sweep.plan import Member, Published, Sweep, published, shown
from mpifed.sweep.state import disagreement, some

BEST = 5
STATISTICS = {
    "final": "after the last round",
    "best": "best of all evaluations",
    f"last{LAST}": "mean of the last ten evaluations",
    f"best{BEST}": "mean of the five best evaluations",
}
NO_VALUE = "-"


# --- a metric ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Metric:
    """`[COLUMN.]STATISTIC` of a column of `metrics.jsonl`: `final`, `best5`, `accuracy_own`, `accuracy_own.best5`.

    Columns with `accuracy` in their name are fractions, and shown in percent.
    """

    column: str
    statistic: str

    @classmethod
    def parse(cls, text: str) -> Metric:
        """A statistic alone is one of `accuracy`; a column alone is its last value."""
        if text in STATISTICS:
            return cls("accuracy", text)
        column, _, statistic = text.rpartition(".")
        return cls(column, statistic) if column and statistic in STATISTICS else cls(text, "final")

    @property
    def percent(self) -> bool:
        return "accuracy" in self.column

    @property
    def title(self) -> str:
        """`test accuracy (%), after the last round`."""
        name = "test accuracy" if self.column == "accuracy" else self.column
        return f"{name}{' (%)' if self.percent else ''}, {STATISTICS[self.statistic]}"

    def values(self, run: Run) -> list[float]:
        """What a run adds to the mean: one value, or with `best5` the five best, as FedGen's code pools them."""
        found = [value for row in run.metrics if (value := column_value(row, self.column)) is not None]
        if not found:
            return []
        if self.statistic == f"best{BEST}":
            return sorted(found)[-BEST:]
        if self.statistic == f"last{LAST}":
            return [math.fsum(found[-LAST:]) / len(found[-LAST:])]
        return [max(found)] if self.statistic == "best" else [found[-1]]

    def text(self, mean: float, std: float | None = None) -> str:
        """`91.30 ± 0.74` in percent; others as far as the deviation's second digit. Without `std` the mean alone."""
        digits = 2 if self.percent else None if not std else max(0, 1 - math.floor(math.log10(std)))
        factor = 100 if self.percent else 1
        values = [mean] if std is None else [mean, std]
        return " ± ".join(f"{value:.4g}" if digits is None else f"{factor * value:.{digits}f}" for value in values)


# --- the results ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Results:
    """A sweep with the runs of its complete members by name, and why each other member is missing."""

    sweep: Sweep
    runs: Mapping[str, Run]
    missing: Mapping[str, str]
    notes: Sequence[str]

    @property
    def metrics(self) -> list[Metric]:
        return [Metric.parse(text) for text in self.sweep.settings.metric]

    @cached_property
    def _groups(self) -> dict[tuple[str, str], list[Member]]:
        groups: dict[tuple[str, str], list[Member]] = {}
        for member in self.sweep.members:
            groups.setdefault((member.variant, _key(member.point)), []).append(member)
        return groups

    def members_at(self, variant: str, point: Mapping[str, Any]) -> list[Member]:
        """The members of a variant at a point of the grid: one for each seed."""
        return self._groups[variant, _key(point)]

    def runs_at(self, variant: str, point: Mapping[str, Any]) -> list[Run]:
        """The complete ones of `members_at`."""
        return [self.runs[member.name] for member in self.members_at(variant, point) if member.name in self.runs]

    def points(self, panel: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The points of a panel, in order of the table's columns; without a grid there is one, which is empty."""
        columns = self.sweep.columns
        values = self.sweep.grid.get(columns)
        if values is None:
            return [{}]
        return [{key: panel.get(key, value) for key in self.sweep.grid} for value in values]


def _key(point: Mapping[str, Any]) -> str:
    return repr(sorted(point.items()))


def read_results(sweep: Sweep) -> Results:
    """Read every member's folder. Raises `BadInput` where there is no folder of the sweep at all."""
    if not sweep.folder.is_dir():
        raise BadInput(f"{sweep.folder}: nothing of this sweep has been run; python -m mpifed sweep ... --run")
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    notes: list[str] = []
    for member in sweep.members:
        if not member.folder.job.is_file():
            missing[member.name] = "not started"
            continue
        run = read_run(member.folder.path)
        notes += run.notes
        differs = disagreement(member, run.job)
        if differs:
            missing[member.name] = f"its folder holds another job: {differs}"
        elif run.complete and run.metrics:
            runs[member.name] = run
        else:
            missing[member.name] = run.state
    return Results(sweep, runs, missing, notes)


# --- tables -----------------------------------------------------------------------------------------------------------
def tables(results: Results) -> Iterator[Table]:
    """Per combination of the grid's other keys: a table for each metric, and one of bytes and seconds."""
    for panel in results.sweep.panels:
        for metric in results.metrics:
            yield metric_table(results, metric, panel)
        yield cost_table(results, panel)


def metric_table(results: Results, metric: Metric, panel: Mapping[str, Any]) -> Table:
    """Variants x values of `columns`; published numbers in lines of their own beneath the variant's."""
    sweep = results.sweep
    points = results.points(panel)
    sources = [table for table in sweep.settings.published if not table.metric or Metric.parse(table.metric) == metric]
    means = {
        variant.label: [_mean(metric, results.runs_at(variant.label, point)) for point in points]
        for variant in sweep.variants
    }
    best = [_best(results, metric, point) for point in points]
    rows: list[list[Cell]] = []
    cited: list[Published] = []
    for variant in sweep.variants:
        cells = [
            _metric_cell(
                results, metric, variant.label, point, not variant.bound and mean is not None and mean == best[column]
            )
            for column, (point, mean) in enumerate(zip(points, means[variant.label], strict=True))
        ]
        rows.append([Cell(variant.label), *cells])
        for table in sources:
            numbers = [_published(sweep, table, variant.label, point) for point in points]
            if any(numbers):
                if table not in cited:
                    cited.append(table)
                label = Cell(f"  published [{cited.index(table) + 1}]", aside=True)
                rows.append([label, *(Cell(number, aside=True) for number in numbers)])
    notes = [_spread_note(sweep, metric)]
    notes += [f"[{index + 1}] {table.source}" for index, table in enumerate(cited)]
    notes += _missing_note(results, points)
    return Table(
        _title(results, metric.title, panel),
        ["", *_headings(sweep, metric)],
        rows,
        notes,
        columns_title=sweep.labels.get(sweep.columns, ""),
        label=f"{sweep.name}-{metric.column}-{metric.statistic}",
        strong="the highest mean of a column that misses no member",
    )


def _title(results: Results, what: str, panel: Mapping[str, Any]) -> str:
    where = "".join(f", {results.sweep.labels[key]} = {shown(value)}" for key, value in panel.items())
    return f"{results.sweep.title}: {what}{where}"


def _headings(sweep: Sweep, metric: Metric) -> list[str]:
    return [shown(value) for value in sweep.grid[sweep.columns]] if sweep.grid else [metric.statistic]


def _pooled(metric: Metric, runs: Sequence[Run]) -> list[float]:
    return [value for run in runs for value in metric.values(run)]


def _mean(metric: Metric, runs: Sequence[Run]) -> float | None:
    values = _pooled(metric, runs)
    return float(np.mean(values)) if values else None


def _best(results: Results, metric: Metric, point: Mapping[str, Any]) -> float | None:
    """The highest of a column's means, bounds aside, where none is missing, and where higher is better."""
    rivals = [variant.label for variant in results.sweep.variants if not variant.bound]
    means = [_mean(metric, results.runs_at(label, point)) for label in rivals]
    whole = all(len(results.runs_at(label, point)) == len(results.members_at(label, point)) for label in rivals)
    present = [mean for mean in means if mean is not None]
    return max(present) if metric.percent and whole and 1 < len(present) == len(means) else None


def _metric_cell(results: Results, metric: Metric, variant: str, point: Mapping[str, Any], strong: bool) -> Cell:
    planned = len(results.members_at(variant, point))
    runs = [run for run in results.runs_at(variant, point) if metric.values(run)]
    values = _pooled(metric, runs)
    if not values:
        return Cell(NO_VALUE)
    text = metric.text(float(np.mean(values)), float(np.std(values)) if len(values) > 1 else None)
    return Cell(text if len(runs) == planned else f"{text} ({len(runs)} of {planned})", strong=strong)


def _published(sweep: Sweep, table: Published, variant: str, point: Mapping[str, Any]) -> str:
    if any(point.get(key) != value for key, value in table.where.items()):
        return ""
    found = published(sweep, table, variant, point.get(sweep.columns))
    if found is None:
        return ""
    return f"{found.mean:.2f}" if found.std is None else f"{found.mean:.2f} ± {found.std:.2f}"


def _spread_note(sweep: Sweep, metric: Metric) -> str:
    seeds = len(sweep.settings.seeds) or 1
    what = f"{seeds} seed{'s' if seeds != 1 else ''}"
    if metric.statistic == f"best{BEST}":
        what += f" x {BEST} rounds each"
    elif seeds == 1:
        return f"{what}."
    return f"Mean ± population standard deviation over {what}."


def _missing_note(results: Results, points: Sequence[Mapping[str, Any]]) -> list[str]:
    """One remark on the members of a table that are not in it."""
    members = [
        member
        for variant in results.sweep.variants
        for point in points
        for member in results.members_at(variant.label, point)
    ]
    names = [member.name for member in members if member.name in results.missing]
    if not names:
        return []
    return [f"Missing: {len(names)} of {len(members)} members ({some(names)})."]


# --- what it cost -----------------------------------------------------------------------------------------------------
COST = ("rounds", "up MB", "down MB", "MPI sent MB", "seconds")


def cost_table(results: Results, panel: Mapping[str, Any]) -> Table:
    """Bytes and seconds of a run, means over seeds; over the columns too where all of them send the same."""
    sweep = results.sweep
    points = results.points(panel)
    split = len(points) > 1 and any(_differ(results, variant.label, points) for variant in sweep.variants)
    rows = []
    for variant in sweep.variants:
        for group in [[point] for point in points] if split else [points]:
            runs = [run for point in group for run in results.runs_at(variant.label, point)]
            heading = [Cell(variant.label), *([Cell(shown(group[0][sweep.columns]))] if split else [])]
            rows.append([*heading, *(Cell(text) for text in _cost(runs))])
    ranks = sorted({run.ranks for run in results.runs.values() if run.ranks is not None})
    notes = [
        "Means of a run; ± population standard deviation where runs differ. up and down: payload of all clients after "
        "compression; MPI sent: buffers that all ranks handed to MPI; 1 MB = 10^6 bytes. seconds: wall time of the "
        f"rounds, on {' or '.join(map(str, ranks)) or '?'} rank{'' if ranks == [1] else 's'}."
    ]
    return Table(
        _title(results, "bytes and seconds of a run", panel),
        ["", *([sweep.labels[sweep.columns]] if split else []), *COST],
        rows,
        notes + _missing_note(results, points),
        left=2 if split else 1,
        label=f"{sweep.name}-cost",
    )


def _payload(run: Run) -> float:
    return float(sum(run.totals["bytes"]["logical"].values()))


def _differ(results: Results, variant: str, points: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the payload depends on the column: means more than half a percent apart."""
    groups = [results.runs_at(variant, point) for point in points]
    means = [float(np.mean([_payload(run) for run in runs])) for runs in groups if runs]
    return bool(means) and max(means) - min(means) > 0.005 * max(means)


def _cost(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return [NO_VALUE] * len(COST)
    sent = [run.totals["bytes"] for run in runs]
    return [
        _spread([run.totals["rounds"] for run in runs], lambda value: f"{value:g}"),
        _spread([one["logical"]["up"] for one in sent], megabytes),
        _spread([one["logical"]["down"] for one in sent], megabytes),
        _spread([one["mpi"]["sent"] for one in sent], megabytes),
        _spread([run.totals["seconds"]["total"] for run in runs], lambda value: f"{value:,.1f}"),
    ]


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The mean, and the deviation where it can be seen."""
    mean, std = float(np.mean(values)), float(np.std(values))
    return text(mean) if std <= 0.005 * mean or text(std) == text(0) else f"{text(mean)} ± {text(std)}"


# --- whole documents --------------------------------------------------------------------------------------------------
def document(results: Results, form: Form) -> str:
    """All tables, then what is missing, in one of the forms; LaTeX has the latter as comments."""
    sweep = results.sweep
    parts = [RENDER[form](table) for table in tables(results)]
    remarks = _remarks(results)
    if form == "text":
        return "\n\n".join([*parts, *(["\n".join(remarks)] if remarks else [])])
    if form == "latex":
        head = [
            f"% {sweep.title} ({len(results.runs)} of {len(sweep.members)} members); needs \\usepackage{{booktabs}}"
        ]
        return "\n\n".join(["\n".join(head + [f"% {line}" for line in remarks]), *parts])
    return "\n\n".join([*parts, *(["### Missing\n\n" + "\n".join(f"- {line}" for line in remarks)] if remarks else [])])


def _remarks(results: Results) -> list[str]:
    """Every missing member with its reason, grouped by reason; and what could not be read."""
    reasons: dict[str, list[str]] = {}
    for name, why in results.missing.items():
        reasons.setdefault(why, []).append(name)
    lines = [f"{why}: {', '.join(names)}" for why, names in reasons.items()]
    return lines + [f"note: {note}" for note in results.notes]


def page(results: Results, figures: Sequence[tuple[str, Path]]) -> str:
    """The Markdown page: what was run, tables, figures (`caption`, file beside the page), what is missing."""
    sweep = results.sweep
    lines = [
        f"# {sweep.title}",
        "",
        f"{len(results.runs)} of {len(sweep.members)} members of the sweep are complete.",
        "",
        document(results, "markdown"),
    ]
    for caption, path in figures:
        lines += ["", f"![{caption}]({path.name})", "", caption]
    return "\n".join(lines) + "\n"


def members_csv(results: Results) -> str:
    """CSV with a row a member: what it is, its state, metrics (fractions), bytes, seconds; unknown is empty."""
    sweep = results.sweep
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["member", "variant", *sweep.grid, "seed", "state", *sweep.settings.metric]
        + ["rounds", "logical_up", "logical_down", "mpi_sent", "seconds", "ranks", "job_sha256"]
    )
    for member in sweep.members:
        run = results.runs.get(member.name)
        row: list[Any] = [member.name, member.variant, *(shown(member.point[key]) for key in sweep.grid)]
        if run is None:
            seed = member.seed
            writer.writerow([*row, seed, results.missing[member.name], *([None] * (len(results.metrics) + 7))])
            continue
        sent = run.totals["bytes"]
        row += [run.seed, run.state, *(_mean(metric, [run]) for metric in results.metrics), run.totals["rounds"]]
        row += [sent["logical"]["up"], sent["logical"]["down"], sent["mpi"]["sent"], run.totals["seconds"]["total"]]
        writer.writerow([*row, run.ranks, _sha256(member)])
    return file.getvalue()


def _sha256(member: Member) -> str | None:
    try:
        summary = member.folder.read_summary() or {}
    except BadInput:
        return None
    found = summary.get("job_sha256")
    return found if isinstance(found, str) else None
