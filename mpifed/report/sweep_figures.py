"""The figures of a sweep: accuracy against payload and against rounds, every variant a line, labelled where it ends.

One panel for each point of the grid, all on the same axes. A line is the mean over the seeds' complete runs, the band
around it one standard deviation (of the population) to each side.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from mpifed.report.figures import DASHES, PALETTE, STYLE
from mpifed.report.runs import Run
from mpifed.report.sweep import Metric, Results
from mpifed.sweep.plan import shown

PANELS_IN_A_ROW = 3
LABEL_POINTS = 8.0
"""Font size of a line's label."""

Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """One variant at one point of the grid: arrays of one length, and how many runs they are of."""

    label: str
    rounds: Column
    bytes: Column
    mean: Column
    std: Column
    runs: int
    style: tuple[str, str]

    @property
    def sends(self) -> bool:
        return bool(self.bytes[-1] > 0)


def draw(results: Results, out: Path) -> list[tuple[str, Path]]:
    """Draw into the folder `out`, each figure as PNG and PDF; returns caption and PNG of each."""
    saved = []
    with matplotlib.rc_context(STYLE | {"savefig.dpi": 200, "pdf.fonttype": 42}):
        for column in dict.fromkeys(metric.column for metric in results.metrics):
            metric = Metric(column, "final")
            panels = [panel for panel in _panels(results, column) if panel[1]]
            for axis, what in (("bytes", "payload sent so far, up and down"), ("rounds", "rounds")):
                if not any(line.sends or axis == "rounds" for _, lines in panels for line in lines):
                    continue
                file = out / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', column)}-{axis}.png"
                figure = curves_figure(panels, metric, axis)
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
    styles = [(dash, colour) for dash in DASHES for colour in PALETTE]
    panels = []
    for panel in sweep.panels:
        for point in results.points(panel):
            lines = [
                _line(variant.label, results.runs_at(variant.label, point), column, style)
                for variant, style in zip(sweep.variants, itertools.cycle(styles), strict=False)
            ]
            title = ", ".join(f"{sweep.labels[key]} = {shown(value)}" for key, value in point.items())
            panels.append((title, [line for line in lines if line is not None]))
    return panels


def _line(label: str, runs: Sequence[Run], column: str, style: tuple[str, str]) -> Line | None:
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
    return Line(label, np.array(common), sent.mean(0), values.mean(0), values.std(0), len(curves), style)


# --- the drawing ------------------------------------------------------------------------------------------------------
def curves_figure(panels: Sequence[tuple[str, Sequence[Line]]], metric: Metric, axis: str) -> Figure:
    """One panel after another, axes shared; `axis` is `bytes` (logarithmic) or `rounds`."""
    columns = min(len(panels), PANELS_IN_A_ROW)
    rows = -(-len(panels) // columns)
    most = max(len(lines) for _, lines in panels)
    width = 6.4 if columns == 1 else 4.6 if columns == 2 else 3.9
    height = max(3.2, 0.7 + 0.17 * most)
    figure = Figure(figsize=(width * columns, height * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    used = list(zip(grid.flat, panels, strict=False))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in used:
        _draw_lines(axes, lines, axis)
        axes.set_title(title)
        axes.tick_params(labelbottom=True)
    for axes in grid[-1]:
        axes.set_xlabel("payload sent so far, up and down" if axis == "bytes" else "round")
    for row in grid:
        row[0].set_ylabel("test accuracy" if metric.column == "accuracy" else metric.column)
    first = grid.flat[0]
    if metric.percent:
        first.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
        first.set_ylim(top=min(1.0, first.get_ylim()[1]))
    _make_room(figure, [axes for axes, _ in used], [lines for _, (_, lines) in used], axis)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the labels are placed for the axes as they are now
    for axes, (_, lines) in used:
        _label(axes, lines, axis)
    return figure


def _draw_lines(axes: Axes, lines: Sequence[Line], axis: str) -> None:
    if axis == "bytes":
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter("B", sep=" "))
        axes.xaxis.set_minor_locator(NullLocator())
    for line in lines:
        dash, colour = line.style
        x = line.bytes if axis == "bytes" else line.rounds
        if axis == "bytes" and not line.sends:  # a bound, not a curve: what it reaches without a byte
            axes.axhline(line.mean[-1], color=colour, linestyle=(0, (1, 2)), linewidth=1.4, zorder=1.5)
            continue
        keep = x > 0
        axes.plot(x[keep], line.mean[keep], color=colour, linestyle=dash, linewidth=1.6)
        axes.plot(x[-1], line.mean[-1], color=colour, marker="o", markersize=3.5)
        if line.runs > 1:
            low, high = (line.mean + sign * line.std for sign in (-1, 1))
            axes.fill_between(x[keep], low[keep], high[keep], color=colour, alpha=0.14, linewidth=0)


def _limits(lines: Sequence[Sequence[Line]], axis: str) -> tuple[float, float]:
    """Smallest and largest x of what is drawn."""
    arrays = [
        line.bytes[line.bytes > 0] if axis == "bytes" else line.rounds
        for panel in lines
        for line in panel
        if line.sends or axis == "rounds"
    ]
    return min(float(x.min()) for x in arrays), max(float(x.max()) for x in arrays)


def _make_room(figure: Figure, panels: Sequence[Axes], lines: Sequence[Sequence[Line]], axis: str) -> None:
    """Extend the shared x axis to the right by the width of the longest label; ticks and axis end with the data."""
    low, high = _limits(lines, axis)
    widest = max(_text_width(figure, _label_text(line, axis)) for panel in lines for line in panel)
    figure.draw_without_rendering()
    share = min(0.45, (widest + 16 * figure.dpi / 72) / min(axes.bbox.width for axes in panels))
    first = panels[0]
    if axis == "bytes":
        decades = max(np.log10(high / low), 0.5)
        low = high / 10**decades
        first.set_xlim(low / 10 ** (0.02 * decades), high * 10 ** (decades * share / (1 - share)))
        first.xaxis.set_major_locator(LogLocator(numticks=max(3, int(panels[0].bbox.width * (1 - share) / 50))))
    else:
        low = 0.0
        first.set_xlim(low, high + (high - low) * share / (1 - share))
        first.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ticks = [tick for tick in first.xaxis.get_major_locator()() if low * 0.999 <= tick <= high * 1.001]
    first.set_xticks(ticks)
    for axes in panels:
        axes.spines["bottom"].set_bounds(first.get_xlim()[0], high)


def _label_text(line: Line, axis: str) -> str:
    return f"{line.label} (sends nothing)" if axis == "bytes" and not line.sends else line.label


def _text_width(figure: Figure | SubFigure, text: str) -> float:
    """In pixels."""
    artist = figure.text(0, 0, text, fontsize=LABEL_POINTS)
    width = artist.get_window_extent().width
    artist.remove()
    return float(width)


@dataclass
class _Place:
    """A label: where its line ends and where the label stands, in pixels."""

    line: Line
    text: str
    end: tuple[float, float]
    left: float
    right: float
    y: float


def _label(axes: Axes, lines: Sequence[Line], axis: str) -> None:
    """Every line's name right of its end, moved up or down where names would overlap, with a thin line back then."""
    pixel = axes.figure.dpi / 72
    gap, height = 7 * pixel, 1.25 * LABEL_POINTS * pixel
    high = axes.spines["bottom"].get_bounds()[1]
    places = []
    for line in lines:
        x = (line.bytes if axis == "bytes" else line.rounds)[-1]
        x = high if axis == "bytes" and not line.sends else x
        end = axes.transData.transform((x, line.mean[-1]))
        text = _label_text(line, axis)
        left = end[0] + gap
        right = left + _text_width(axes.figure, text)
        places.append(_Place(line, text, (end[0], end[1]), left, right, end[1]))
    for group in _overlapping(places):
        _spread(group, height, axes.bbox.y0 + height / 2, axes.bbox.y1)
    back = axes.transData.inverted()
    for place in places:
        x, y = back.transform((place.left, place.y))
        colour = _ink(place.line.style[1])
        label = axes.text(x, y, place.text, color=colour, va="center", fontsize=LABEL_POINTS, zorder=5)
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        if abs(place.y - place.end[1]) > height / 3:
            start = back.transform((place.end[0] + 2.5 * pixel, place.end[1]))
            stop = back.transform((place.left - 1.5 * pixel, place.y))
            axes.plot(*zip(start, stop, strict=True), color=colour, linewidth=0.6, zorder=4, scalex=False, scaley=False)


def _overlapping(places: Sequence[_Place]) -> list[list[_Place]]:
    """Groups of labels that share some part of the x axis, directly or through others."""
    groups: list[list[_Place]] = []
    reach = -np.inf
    for place in sorted(places, key=lambda place: place.left):
        if place.left > reach:
            groups.append([])
        groups[-1].append(place)
        reach = max(reach, place.right)
    return groups


def _spread(group: list[_Place], height: float, low: float, high: float) -> None:
    """Move labels apart to `height`, in the order of their lines' ends, as little as a least-squares fit allows."""
    group.sort(key=lambda place: place.end[1])
    blocks: list[list[_Place]] = []  # of labels that stand one on the other

    def bottom(block: list[_Place]) -> float:
        wanted = float(np.mean([place.end[1] - index * height for index, place in enumerate(block)]))
        return max(low, min(wanted, high - (len(block) - 1) * height))

    for place in group:
        blocks.append([place])
        while len(blocks) > 1 and bottom(blocks[-1]) < bottom(blocks[-2]) + len(blocks[-2]) * height:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    for block in blocks:
        for index, place in enumerate(block):
            place.y = bottom(block) + index * height


def _ink(colour: str) -> str | tuple[float, float, float]:
    """A colour as dark as text on white has to be (contrast 4.5 to 1, WCAG 2)."""
    red, green, blue = to_rgb(colour)
    while 1.05 / (_luminance((red, green, blue)) + 0.05) < 4.5:
        red, green, blue = 0.95 * red, 0.95 * green, 0.95 * blue
    return red, green, blue


def _luminance(colour: tuple[float, float, float]) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
