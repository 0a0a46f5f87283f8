"""The report's figures. Matplotlib without pyplot, so that nothing global is touched and no display is needed.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), told apart by colour-blind readers too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, PercentFormatter

from mpifed.progress import megabytes
from mpifed.report.runs import Run
from mpifed.report.traffic_figure import traffic_figure
from mpifed.storage.record import PartitionRecord

BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, BLACK = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
)
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, BLACK)
DASHES = ("-", "--", ":", "-.")
GREY = "#5A5A5A"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#222222",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}
WIDE_RANGE = 30
"""Sizes farther apart than this factor are drawn on a logarithmic axis, or as shares."""
TIMES = {"train": BLUE, "communicate": ORANGE, "evaluate": GREEN, "server": PURPLE, "wait": "#D0D0D0"}


def draw(runs: Sequence[Run], out: Path) -> list[tuple[str, Path]]:
    """Draw what the runs have data for into the folder `out`; returns caption and file of each figure."""
    figures: list[tuple[str, str, Figure]] = []
    with matplotlib.rc_context(STYLE):
        evaluated = [run for run in runs if len(run.curve()["accuracy"])]
        if evaluated:
            figures.append(("Accuracy", "accuracy.png", accuracy_figure(evaluated)))
        counted = [run for run in runs if run.by_kind]
        if counted:
            figures.append(("Bytes by kind", "bytes.png", bytes_figure(counted)))
        timed = [run for run in runs if run.record is not None and len(run.record.rank_times["rank"])]
        if timed:
            figures.append(("Time of each rank", "time.png", time_figure(timed)))
        for run in runs:
            if run.record is not None and len(run.record.wire_flows.get("sent", ())):
                figures.append(
                    (f"Wire bytes of {run.name}", f"traffic-{_file(run.name)}.png", traffic_figure(run.record))
                )
        for names, partition in _partitions(runs):
            file = f"partition-{_file(names[0])}.png"
            figures.append((f"Partition of {', '.join(names)}", file, partition_figure(partition)))
        saved = []
        for caption, file, figure in figures:
            figure.savefig(out / file, bbox_inches="tight", pad_inches=0.12)
            saved.append((caption, out / file))
    return saved


def _file(name: str) -> str:
    """A run's name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


# --- accuracy ---------------------------------------------------------------------------------------------------------
def accuracy_figure(runs: Sequence[Run]) -> Figure:
    """Test accuracy against rounds, payload and time, one line a run."""
    figure = Figure(figsize=(11, 3.9), layout=ConstrainedLayoutEngine(w_pad=0.1))
    panels = figure.subplots(1, 3, sharey=True)
    curves = [run.curve() for run in runs]
    styles = [(dash, colour) for dash in DASHES for colour in PALETTE]
    labels = ("round", "payload up and down", "time (s)")
    for axes, column, label in zip(panels, ("round", "bytes", "seconds"), labels, strict=True):
        for curve, (dash, colour) in zip(curves, itertools.cycle(styles), strict=False):
            axes.plot(curve[column], curve["accuracy"], color=colour, linestyle=dash, linewidth=1.6)
            axes.plot(curve[column][-1], curve["accuracy"][-1], color=colour, marker="o", markersize=4)
        ends = [curve[column][-1] for curve in curves]
        if column != "round" and min(ends) > 0 and max(ends) / min(ends) > WIDE_RANGE:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=6))
        else:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=column == "round"))
        if column == "bytes":
            axes.xaxis.set_major_formatter(EngFormatter("B"))
        axes.set_xlabel(label)
    panels[0].set_ylabel("test accuracy")
    panels[0].yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    handles = panels[0].lines[::2]
    names = [f"{run.name}  {100 * curve['accuracy'][-1]:.1f} %" for run, curve in zip(runs, curves, strict=True)]
    columns = max(1, min(len(runs), int(130 / (max(map(len, names)) + 8))))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=2.4)
    return figure


# --- bytes ------------------------------------------------------------------------------------------------------------
def bytes_figure(runs: Sequence[Run]) -> Figure:
    """Payload of each run by kind: downloads in blues, uploads in oranges, with the total at the bar's end."""
    totals = np.array([max(1, sum(run.by_kind.values())) for run in runs], float)
    shares = totals.max() / totals.min() > WIDE_RANGE
    widths = 100 / totals if shares else np.ones(len(runs))
    longest = float((totals * widths).max())
    colours = _kind_colours(runs)
    figure = Figure(figsize=(9, 1.1 + 0.42 * len(runs)), layout="constrained")
    axes = figure.subplots()
    for row, (run, width) in enumerate(zip(runs, widths, strict=True)):
        left = 0.0
        for kind in colours:
            size = run.by_kind.get(kind, 0) * width
            if not size:
                continue
            axes.barh(row, size, left=left, color=colours[kind], height=0.68, edgecolor="white", linewidth=0.8)
            if size > 0.011 * longest * len(kind) + 0.02 * longest:
                axes.text(left + size / 2, row, kind, ha="center", va="center", color=_ink(colours[kind]), fontsize=8)
            left += size
        size_text = f"{megabytes(sum(run.by_kind.values()))} MB"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(left + 0.012 * longest, row, size_text, va="center", color="#222222", bbox=box)
    axes.set_yticks(range(len(runs)), [run.name for run in runs], color="#222222")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * longest)
    axes.spines["bottom"].set_bounds(0, longest)
    if shares:
        axes.set_xlabel("share of the run's payload (%)")
        axes.set_xticks(range(0, 101, 20))
    else:
        axes.set_xlabel("payload")
        axes.xaxis.set_major_formatter(EngFormatter("B"))
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= longest])
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    handles = [matplotlib.patches.Patch(color=colour, label=kind) for kind, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=5, handlelength=1.2)
    return figure


def _kind_colours(runs: Sequence[Run]) -> dict[str, tuple[float, float, float]]:
    """A colour for every kind, downloads first: shades of one hue a direction, the largest kind the fullest."""
    largest: dict[str, float] = {}
    for run in runs:
        for kind, size in run.by_kind.items():
            if size:
                largest[kind] = max(largest.get(kind, 0), size / sum(run.by_kind.values()))
    colours: dict[str, tuple[float, float, float]] = {}
    for direction, hue in (("down.", BLUE), ("up.", ORANGE), ("", GREY)):
        group = [kind for kind in largest if kind not in colours and kind.startswith(direction)]
        for index, kind in enumerate(sorted(group, key=lambda kind: (-largest[kind], kind))):
            lightness = 0.75 * index / max(3, len(group) - 1)
            red, green, blue = (channel + (1 - channel) * lightness for channel in to_rgb(hue))
            colours[kind] = (red, green, blue)
    return colours


def _ink(background: tuple[float, float, float]) -> str:
    """Black or white, whichever reads better (relative luminance as in WCAG 2, without gamma)."""
    return "white" if np.dot(background, (0.2126, 0.7152, 0.0722)) < 0.55 else "black"


# --- time -------------------------------------------------------------------------------------------------------------
def time_figure(runs: Sequence[Run]) -> Figure:
    """Where the time of each rank went over the whole run, one panel a run."""
    ranks = [len(np.unique(run.record.rank_times["rank"])) for run in runs if run.record is not None]
    heights = [0.55 + min(4.0, 0.24 * count) for count in ranks]
    figure = Figure(figsize=(9, 0.7 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, run, count in zip(panels, runs, ranks, strict=True):
        assert run.record is not None
        columns = run.record.rank_times
        row = np.unique(columns["rank"], return_inverse=True)[1]
        left = np.zeros(count)
        for name, colour in TIMES.items():
            spent = np.bincount(row, weights=columns[name], minlength=count)
            axes.barh(np.arange(count), spent, left=left, height=0.78, color=colour, label=name)
            left += spent
        axes.set_title(run.name)
        axes.set_xlim(left=0)
        axes.set_ylim(count - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_ylabel("rank")
        if count <= 16:
            axes.set_yticks(range(count))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    panels[-1].set_xlabel("time over all rounds (s)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(TIMES), handlelength=1.2)
    return figure


# --- partition --------------------------------------------------------------------------------------------------------
def _partitions(runs: Sequence[Run]) -> list[tuple[list[str], PartitionRecord]]:
    """Different partitions, each with the names of the runs that share it."""
    found: dict[str, tuple[list[str], PartitionRecord]] = {}
    for run in runs:
        if run.record is not None and run.record.partition is not None and run.record.partition.histogram.size:
            found.setdefault(run.record.partition.sha256, ([], run.record.partition))[0].append(run.name)
    return list(found.values())


def partition_figure(partition: PartitionRecord) -> Figure:
    """Training samples of each client and class: circle areas, or shades where there are many; totals above."""
    histogram = partition.histogram
    clients, classes = histogram.shape
    circles = clients <= 60 and classes <= 30
    cell = min(0.34, 12 / clients) if circles else 0.0
    width = max(4.0, cell * clients) if circles else 10.0
    height = max(1.5, cell * classes) if circles else min(6.0, max(2.2, 0.2 * classes))
    figure, (above, below) = _stacked(width, height)
    above.bar(np.arange(clients), histogram.sum(1), width=0.8 if circles else 1.0, color=GREY)
    above.set_ylabel("samples")
    above.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    above.tick_params(labelbottom=False, length=0)
    above.grid(axis="x", visible=False)
    if circles:
        _circles(below, histogram, 0.95 * cell)
    else:
        _shades(figure, below, histogram)
    for axes in (above, below):
        axes.set_xlim(-0.6, clients - 0.4)
    below.set_ylim(-0.6, classes - 0.4)
    below.set_xlabel("client")
    below.set_ylabel("class")
    below.xaxis.set_major_locator(_whole_numbers(clients))
    below.yaxis.set_major_locator(_whole_numbers(classes))
    return figure


def _whole_numbers(count: int) -> FixedLocator | MaxNLocator:
    """Ticks at 0, 1, ...: all of a few, or some of many."""
    return FixedLocator(range(count)) if count <= 20 else MaxNLocator(20, integer=True, steps=[1, 2, 5, 10])


def _stacked(width: float, height: float) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two axes of one width in inches: a low one above one of the given height, with room for a legend at the right."""
    left, bottom, gap, top, right = 0.75, 0.55, 0.12, 0.7, 1.3
    whole = (left + width + right, bottom + height + gap + top + 0.1)
    figure = Figure(figsize=whole)
    above = figure.add_axes((left / whole[0], (bottom + height + gap) / whole[1], width / whole[0], top / whole[1]))
    below = figure.add_axes((left / whole[0], bottom / whole[1], width / whole[0], height / whole[1]))
    return figure, (above, below)


def _circles(axes: Axes, histogram: npt.NDArray[np.int64], largest: float) -> None:
    """Circle areas in proportion to the counts, `largest` inches across at most, and a key of three sizes."""
    client, label = np.nonzero(histogram)
    most = int(histogram.max()) or 1

    def circles(counts: npt.ArrayLike, places: list[tuple[float, float]], transform: object) -> None:
        diameters = largest * np.sqrt(np.asarray(counts) / most)
        axes.add_collection(
            EllipseCollection(
                diameters,
                diameters,
                np.zeros_like(diameters),
                units="inches",
                offsets=places,
                offset_transform=transform,
                facecolor=BLUE,
                clip_on=False,
            ),
            autolim=False,
        )

    circles(histogram[client, label], list(zip(client, label, strict=True)), axes.transData)
    axes.text(1.03, 1, "samples", transform=axes.transAxes, va="top", color="#222222")
    key = sorted({most, _round_count(most / 4), _round_count(most / 16)} - {0}, reverse=True)
    for index, count in enumerate(key):
        place = (
            axes.transAxes.transform((1.03, 1)) + np.array([largest / 2 + 0.05, -0.4 - 0.34 * index]) * axes.figure.dpi
        )
        x, y = axes.transAxes.inverted().transform(place)
        circles([count], [(x, y)], axes.transAxes)
        axes.annotate(
            f"{count:,}",
            (x, y),
            xycoords="axes fraction",
            xytext=(36 * largest + 6, 0),
            textcoords="offset points",
            va="center",
        )


def _round_count(value: float) -> int:
    """A count with one digit that is not zero."""
    if value < 1:
        return 0
    magnitude = 10 ** int(np.log10(value))
    return int(round(value / magnitude) * magnitude)


def _shades(figure: Figure, axes: Axes, histogram: npt.NDArray[np.int64]) -> None:
    """Square-root shades: as circle areas, but for cells of a few pixels."""
    image = axes.imshow(
        histogram.T,
        aspect="auto",
        interpolation="nearest",
        cmap="Blues",
        norm=PowerNorm(0.5, vmin=0, vmax=max(1, int(histogram.max()))),
    )
    axes.grid(visible=False)
    box = axes.get_position()
    bar = figure.add_axes((box.x1 + 0.015, box.y0, 0.012, box.height))
    figure.colorbar(image, cax=bar, label="samples")
    bar.grid(visible=False)
