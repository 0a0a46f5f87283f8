"""The figures of a sweep: accuracy against payload and against rounds, every variant a line, labelled where it ends.

One panel for each point of the grid, all on the same axes. A line is the mean over the seeds' complete runs, the band
around it one standard deviation (of the population) to each side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mpifed.report.figures import DASHES, PALETTE, STYLE
from mpifed.report.runs import Run
from mpifed.report.sweep import Metric, Results
from mpifed.sweep.plan import shown

PANELS_IN_A_ROW = 3
MARKERS = ("o", "s", "^", "D")
LABEL_POINTS = 8.0
"""Font size of a line's label."""

Column = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Line:
    """One variant at one point of the grid: arrays of one length, how many runs they are of, and its `number`."""

    label: str
    rounds: Column
    bytes: Column
    mean: Column
    std: Column
    runs: int
    number: int
    bound: bool

    @property
    def colour(self) -> str:
        return PALETTE[self.number % len(PALETTE)]

    @property
    def dash(self) -> str:
        return DASHES[self.number // len(PALETTE) % len(DASHES)]

    @property
    def marker(self) -> dict[str, Any]:
        """Of the line's end and its label: another shape where colours come round again."""
        shape = MARKERS[self.number // len(PALETTE) % len(MARKERS)]
        return {"marker": shape, "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.5, "zorder": 3}

    @property
    def sends(self) -> bool:
        return bool(self.bytes[-1] > 0)


def draw(results: Results, out: Path) -> list[tuple[str, Path]]:
    """Draw into the folder `out`, each figure as PNG and PDF; returns caption and PNG of each."""
    saved = []
    with rc_context(STYLE | {"savefig.dpi": 200, "pdf.fonttype": 42}):
        for column in dict.fromkeys(metric.column for metric in results.metrics):
            metric = Metric(column, "final")
            panels = [panel for panel in _panels(results, column) if panel[1]]
            whole = len(panels) == len(results.sweep.panels) * len(results.points({}))
            columns = min(len(results.points({})) if whole else len(panels), PANELS_IN_A_ROW)
            for axis, what in (("bytes", "payload sent so far, up and down"), ("rounds", "rounds")):
                if not any(Panel(title, lines, axis).curves for title, lines in panels):
                    continue
                file = out / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', column)}-{axis}.png"
                figure = curves_figure(panels, metric, axis, columns)
                for suffix in (".png", ".pdf"):
                    figure.savefig(file.with_suffix(suffix), bbox_inches="tight", pad_inches=0.08)
                saved.append((_caption(results, metric, what, panels), file))
    return saved


def _caption(results: Results, metric: Metric, what: str, panels: Sequence[tuple[str, Sequence[Line]]]) -> str:
    name = "Test accuracy" if metric.column == "accuracy" else metric.column
    runs = [line.runs for _, lines in panels for line in lines]
    few, many = min(runs), max(runs)
    text = f"{name} against {what}"
    if many > 1:
        text += f": mean and population standard deviation over {few if few == many else f'{few} to {many}'} seeds"
    if results.missing:
        text += f" ({len(results.missing)} of {len(results.sweep.members)} members are missing)"
    return text + "."


# --- the data ---------------------------------------------------------------------------------------------------------
def _panels(results: Results, column: str) -> list[tuple[str, list[Line]]]:
    """Title and lines of every point of the grid, row by row of panels."""
    sweep = results.sweep
    panels = []
    for panel in sweep.panels:
        for point in results.points(panel):
            lines = [
                _line(variant.label, results.runs_at(variant.label, point), column, number, variant.bound)
                for number, variant in enumerate(sweep.variants)
            ]
            title = ", ".join(f"{sweep.labels[key]} = {shown(value)}" for key, value in point.items())
            panels.append((title, [line for line in lines if line is not None]))
    return panels


def _line(label: str, runs: Sequence[Run], column: str, number: int, bound: bool) -> Line | None:
    """Means over the rounds that all runs have evaluated; None where there is none."""
    curves = [curve for run in runs if len((curve := run.curve(column))["round"])]
    if not curves:
        return None
    common = sorted(set.intersection(*(set(curve["round"]) for curve in curves)))
    if not common:
        return None
    rows = [np.searchsorted(curve["round"], common) for curve in curves]
    values = np.array([curve[column][row] for curve, row in zip(curves, rows, strict=True)])
    sent = np.array([curve["bytes"][row] for curve, row in zip(curves, rows, strict=True)])
    return Line(label, np.array(common), sent.mean(0), values.mean(0), values.std(0), len(curves), number, bound)


# --- the drawing ------------------------------------------------------------------------------------------------------
def curves_figure(panels: Sequence[tuple[str, Sequence[Line]]], metric: Metric, axis: str, columns: int) -> Figure:
    """Panels in rows of `columns`, axes shared; `axis` is `bytes` (logarithmic) or `rounds`."""
    rows = -(-len(panels) // columns)
    most = max(len(lines) for _, lines in panels)
    width = {1: 6.4, 2: 4.6}.get(columns, 3.9)
    height = max(3.2, 0.7 + 0.19 * most)
    figure = Figure(figsize=(width * columns, height * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    used = list(zip(grid.flat, [Panel(title, lines, axis) for title, lines in panels], strict=False))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in used:
        _draw_lines(axes, panel)
        axes.set_title(panel.title)
        axes.tick_params(labelbottom=True)
        axes.grid(visible=False, axis="y")
    for axes, _ in used[-columns:]:
        axes.set_xlabel("payload sent so far, up and down" if axis == "bytes" else "round")
    for row in grid:
        row[0].set_ylabel("test accuracy" if metric.column == "accuracy" else metric.column)
    _set_heights(used, metric.percent)
    _make_room(figure, used)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the labels are placed for the axes as they are now
    for axes, panel in used:
        _draw_grid(axes)
        _label(axes, panel)
    return figure


@dataclass(frozen=True)
class Panel:
    """One set of axes: curves, and on an axis of bytes `bounds`: level lines of what sends nothing, or is no rival."""

    title: str
    lines: Sequence[Line]
    axis: str

    @property
    def curves(self) -> list[Line]:
        return [line for line in self.lines if line not in self.bounds]

    @property
    def bounds(self) -> list[Line]:
        return [line for line in self.lines if self.axis == "bytes" and (line.bound or not line.sends)]

    def x(self, line: Line) -> Column:
        return line.bytes if self.axis == "bytes" else line.rounds


def _draw_lines(axes: Axes, panel: Panel) -> None:
    if panel.axis == "bytes":
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter("B", sep=" "))
        axes.xaxis.set_minor_locator(NullLocator())
    for line in panel.curves:
        x = panel.x(line)
        keep = x > 0
        axes.plot(
            x[keep],
            line.mean[keep],
            color=line.colour,
            linestyle=line.dash,
            linewidth=1.5 if len(panel.lines) <= 8 else 1.1,
        )
        axes.plot(x[-1], line.mean[-1], color=line.colour, **line.marker)
        if line.runs > 1:
            low, high = (line.mean + sign * line.std for sign in (-1, 1))
            axes.fill_between(x[keep], low[keep], high[keep], color=line.colour, alpha=0.14, linewidth=0)


def _set_heights(used: Sequence[tuple[Axes, Panel]], percent: bool) -> None:
    """Room for curves and bounds; of percentages, what lies far below the lowest end is cut off, so that the ends are
    told apart."""
    axes = used[0][0]
    drawn = [line.mean for _, panel in used for line in panel.curves]
    drawn += [line.mean[-1:] for _, panel in used for line in panel.bounds]
    lowest, highest = min(float(mean.min()) for mean in drawn), max(float(mean.max()) for mean in drawn)
    margin = 0.06 * (highest - lowest) or 0.01
    if not percent:
        axes.set_ylim(lowest - margin, highest + margin)
        return
    end = min(float(mean[-1]) for mean in drawn)
    bottom = max(lowest - 0.02, end - max(0.15, 0.3 * (highest - end)))
    axes.set_ylim(bottom, min(1.0, highest + 0.06 * (highest - bottom)))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{100 * fraction:.6g} %"))


def _make_room(figure: Figure, used: Sequence[tuple[Axes, Panel]]) -> None:
    """Extend the shared x axis to the right by the width of the longest label; ticks and axis end with the data."""
    bottom = used[0][0].get_ylim()[0]
    arrays = [panel.x(line)[line.mean >= bottom] for _, panel in used for line in panel.curves]
    arrays = [x[x > 0] for x in arrays]
    low, high = min(float(x.min()) for x in arrays), max(float(x.max()) for x in arrays)
    widest = max(_text_width(figure, line.label) for _, panel in used for line in panel.curves)
    figure.draw_without_rendering()
    width = min(axes.bbox.width for axes, _ in used)
    share = min(0.45, (widest + 26 * figure.dpi / 72) / width)
    axes, panel = used[0]
    if panel.axis == "bytes":
        decades = max(np.log10(high / low), 0.5)
        low = high / 10**decades
        axes.set_xlim(low / 10 ** (0.02 * decades), high * 10 ** (decades * share / (1 - share)))
        subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=max(3, int(width * (1 - share) / 50))))
    else:
        low = 0.0
        axes.set_xlim(low, high + (high - low) * share / (1 - share))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xticks([tick for tick in axes.get_xticks() if low * 0.999 <= tick <= high * 1.001])
    for axes, _ in used:
        axes.spines["bottom"].set_bounds(axes.get_xlim()[0], high)
        axes.xaxis.label.set_x((1 - share) / 2)


def _draw_grid(axes: Axes) -> None:
    """Horizontal lines beneath the data alone, not beneath the labels."""
    bottom, top = axes.get_ylim()
    ends = axes.spines["bottom"].get_bounds()
    for tick in axes.get_yticks():
        if bottom <= tick <= top:
            style = {"color": rcParams["grid.color"], "linewidth": rcParams["grid.linewidth"], "zorder": 0.5}
            axes.plot(ends, (tick, tick), scalex=False, scaley=False, **style)


def _text_width(figure: Figure | SubFigure, text: str) -> float:
    """In pixels."""
    artist = figure.text(0, 0, text, fontsize=LABEL_POINTS)
    width = artist.get_window_extent().width
    artist.remove()
    return float(width)


# --- labels -----------------------------------------------------------------------------------------------------------
@dataclass
class _Label:
    """A name and where it stands, all in pixels: `end` of its line, `left` edge, `width` and middle `y`."""

    line: Line
    text: str
    end: tuple[float, float]
    left: float
    width: float
    y: float

    def covers(self, other: _Label, height: float) -> bool:
        apart = self.left + self.width < other.left or other.left + other.width < self.left
        return not apart and abs(self.y - other.y) < height

    def distance(self, point: tuple[float, float]) -> float:
        """From a point to the nearest of the text."""
        nearest = min(max(point[0], self.left), self.left + self.width)
        return math.hypot(point[0] - nearest, point[1] - self.y)

    def crossed(self, points: Column, height: float) -> int:
        """How many of the points `[n, 2]` lie beneath it."""
        x, y = points.T
        inside = (x > self.left - 2) & (x < self.left + self.width + 2) & (abs(y - self.y) < 0.55 * height)
        return int(inside.sum())


def _label(axes: Axes, panel: Panel) -> None:
    """Write every line's name at its end, and that of a bound along it, where they cover nothing."""
    pixel = axes.figure.dpi / 72
    height = 1.3 * LABEL_POINTS * pixel
    gap = 6 * pixel
    ends = np.array([axes.get_xlim()[0], axes.spines["bottom"].get_bounds()[1]])
    drawn = [(panel.x(line), line.mean) for line in panel.curves]
    drawn += [(ends, line.mean[[-1, -1]]) for line in panel.bounds]
    points = np.concatenate([_dense(axes, x, y) for x, y in drawn])
    labels = []
    for line in panel.curves:
        x, y = axes.transData.transform((panel.x(line)[-1], line.mean[-1]))
        labels.append(_Label(line, line.label, (x, y), x + gap, _text_width(axes.figure, line.label) + gap, y))
    last = max(label.end[0] for label in labels)
    column = [label for label in labels if label.end[0] > last - 5 * height]
    _stack(column, height, axes.bbox.y0 + height / 2, axes.bbox.y1 - height / 3, left=last + 2 * gap)
    placed = list(column)
    for label in sorted((label for label in labels if label not in column), key=lambda label: -label.end[1]):
        places = [(gap, 0.0)]
        for rows in (1.0, 1.5, 2.0):  # then above and below: around the end, right and left of it
            for left in (-label.width / 2, gap, -label.width):
                places += [(left, rows * height), (left, -rows * height)]
        _put(label, places, placed, points, height, [other.end for other in labels if other is not label])
        placed.append(label)
    for line in panel.bounds:
        _, y = axes.transData.transform((1, line.mean[-1]))
        text = line.label if line.sends else f"{line.label} (0 bytes)"
        label = _Label(line, text, (axes.bbox.x0, y), 0, _text_width(axes.figure, text), y)
        steps = np.linspace(gap, max(gap, last - axes.bbox.x0 - label.width), 40)
        _put(label, [(x, sign * 0.6 * height) for x in steps for sign in (1, -1)], placed, points, height)
        placed.append(label)
        dots: dict[str, Any] = {"linestyle": (0, (1, 2)), "linewidth": 1.4, "zorder": 1.5}
        axes.plot(ends, line.mean[[-1, -1]], color=line.colour, scalex=False, scaley=False, **dots)
    for label in placed:
        _write(axes, label, keyed=label in column, pixel=pixel)


def _dense(axes: Axes, x: Column, y: Column) -> Column:
    """Points `[n, 2]` in pixels along a curve, a pixel or two apart."""
    corners = axes.transData.transform(np.stack([x[x > 0], y[x > 0]], axis=1))
    steps = [np.linspace(start, stop, 1 + int(np.abs(stop - start).max() / 2)) for start, stop in pairwise(corners)]
    return np.concatenate([corners, *steps])


def _stack(labels: list[_Label], height: float, low: float, high: float, left: float) -> None:
    """One column from `left`, in the order of the lines' ends; moved apart as little as a least-squares fit allows."""
    labels.sort(key=lambda label: label.end[1])
    blocks: list[list[_Label]] = []  # of labels that stand one on the other

    def bottom(block: list[_Label]) -> float:
        wanted = float(np.mean([label.end[1] - index * height for index, label in enumerate(block)]))
        return max(low, min(wanted, high - (len(block) - 1) * height))

    for label in labels:
        blocks.append([label])
        while len(blocks) > 1 and bottom(blocks[-1]) < bottom(blocks[-2]) + len(blocks[-2]) * height:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    for block in blocks:
        for index, label in enumerate(block):
            label.left, label.y = left, bottom(block) + index * height


def _put(
    label: _Label,
    places: Sequence[tuple[float, float]],
    placed: Sequence[_Label],
    points: Column,
    height: float,
    ends: Sequence[tuple[float, float]] = (),
) -> None:
    """At the place (shifts of left edge and middle from the line's end) that covers least; of equals the first.

    Worst is to cover another name, then to stand nearer to the end of another line, one of `ends`, than to its own.
    """

    def cost(place: tuple[float, float]) -> int:
        label.left, label.y = label.end[0] + place[0], label.end[1] + place[1]
        names = sum(label.covers(other, height) for other in placed)
        nearer = any(label.distance(end) < label.distance(label.end) for end in ends)
        return 10_000 * names + 1_000 * nearer + label.crossed(points, height)

    best = min(places, key=cost)
    label.left, label.y = label.end[0] + best[0], label.end[1] + best[1]


def _write(axes: Axes, label: _Label, keyed: bool, pixel: float) -> None:
    """The text; in the column at the right, after the line's end marker, with a thin line back to the line's end."""
    back = axes.transData.inverted()
    left = label.left + (7 * pixel if keyed else 0)
    x, y = back.transform((left, label.y))
    text = axes.text(
        x,
        y,
        label.text,
        color=_ink(label.line.colour),
        va="center_baseline",
        fontsize=LABEL_POINTS,
        zorder=5,
    )
    text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    if keyed:
        key = back.transform((label.left + 2 * pixel, label.y))
        ends = zip(back.transform(label.end), key, strict=True)
        axes.plot(*ends, color=label.line.colour, linewidth=0.6, zorder=1.8, scalex=False, scaley=False)
        axes.plot(*key, color=label.line.colour, scalex=False, scaley=False, **label.line.marker)


def _ink(colour: str) -> tuple[float, float, float]:
    """A colour as dark as text on white has to be (contrast 4.5 to 1, WCAG 2)."""
    red, green, blue = to_rgb(colour)
    while 1.05 / (_luminance((red, green, blue)) + 0.05) < 4.5:
        red, green, blue = 0.95 * red, 0.95 * green, 0.95 * blue
    return red, green, blue


def _luminance(colour: tuple[float, float, float]) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
