"""Who sent what to whom: a heat map of the wire bytes between ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mpifed.progress import megabytes
from mpifed.report.traffic import flow_matrix
from mpifed.storage.record import Record

LABELLED = 12
"""Up to so many ranks, the bytes stand in the cells."""


def traffic_figure(record: Record) -> Figure:
    """Bytes down and up, by sender (row) and receiver (column), in MB and on one scale; empty cells are zero."""
    matrices = {"down": flow_matrix(record, "down"), "up": flow_matrix(record, "up")}
    most = max(1, *(int(matrix.max(initial=0)) for matrix in matrices.values()))
    ranks = len(matrices["down"])
    side = min(5.2, max(2.8, 0.62 * ranks))
    figure = Figure(figsize=(2 * side + 1.2, side + 0.7), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (direction, matrix) in zip(panels, matrices.items(), strict=True):
        shown = np.ma.masked_equal(matrix, 0)
        image = axes.imshow(shown, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=most), interpolation="nearest")
        axes.set_title(f"{direction}, {megabytes(matrix.sum())} MB")
        axes.set_xlabel("receiving rank")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(12, integer=True))
        axes.grid(visible=False)
        axes.spines[["top", "right"]].set_visible(True)
        if ranks <= LABELLED:
            _label(axes, matrix, most)
    panels[0].set_ylabel("sending rank")
    bar = figure.colorbar(image, ax=panels, format=EngFormatter("B"), shrink=0.9, pad=0.02)
    bar.ax.grid(visible=False)
    return figure


def _label(axes: Axes, matrix: npt.NDArray[np.int64], most: int) -> None:
    for (sender, receiver), size in np.ndenumerate(matrix):
        if size:
            text = megabytes(int(size)) if size >= 5000 else "<0.01"
            colour = "white" if size > 0.35 * most else "#333333"
            axes.text(receiver, sender, text, ha="center", va="center", color=colour, fontsize=7.5)
