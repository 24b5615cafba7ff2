"""The plot of the modality gap, drawn by Matplotlib for :func:`safervlm.plot_gap`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safervlm.io.escape import for_figure
from safervlm.reports.plots import offsets_of
from safervlm.reports.runs import Run
from safervlm.results.measures import concept_gaps, modality_gap

WIDTH = 11.0  # width of every plot in inches

# The colours of the page's light theme.
INK, GRID = "#1c2330", "#d9dee6"
MARKERS = "osD^vP"
RUN_COLOURS = ["#5f6b7c", "#0072b2", "#c46a00", "#00805e", "#b0548a", "#2f9bd0"]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "safervlm",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "font.size": 10,
}


# --- plots ------------------------------------------------------------------------------------------------------------


def _style(index: int) -> dict[str, Any]:
    kind = index % len(MARKERS)
    return {"color": RUN_COLOURS[kind], "marker": MARKERS[kind], "markersize": 6, "linestyle": "none"}


def _lines(axes: Axes, labels: Sequence[str]) -> None:
    """Labels the lines of a plot from top to bottom, and sets the range of its percent axis."""
    axes.set_yticks(range(len(labels)), [for_figure(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(-2, 102)


def plot_gap(runs: Sequence[Run]) -> Figure | None:
    """Plots the modality gap of every concept, one line of dots per run, with the mean and its interval.

    Args:
        runs: The runs, in the order of their colours.

    Returns:
        The figure; None if no run has concepts with both names and images.
    """
    gaps = [(run, concept_gaps(run.frame)["gap"].to_numpy(float), modality_gap(run.frame)) for run in runs]
    gaps = [(run, points, mean) for run, points, mean in gaps if len(points)]
    if not gaps:
        return None
    figure = Figure(figsize=(WIDTH, 0.9 + 1.0 * len(gaps)), layout="constrained")
    axes = figure.subplots()
    for line, (run, points, mean) in enumerate(gaps):
        style = _style(list(runs).index(run))
        places = line - 0.02 + 0.45 * offsets_of(points)
        axes.plot(100 * points, places, **{**style, "markersize": 4, "alpha": 0.55, "markeredgewidth": 0})
        if not np.isnan(mean.low):
            axes.plot([100 * mean.low, 100 * mean.high], [line - 0.26] * 2, color=style["color"], linewidth=2)
        axes.plot([100 * mean.value], [line - 0.26], **{**style, "markersize": 8})
    axes.axvline(0, color=INK, linewidth=0.8)
    _lines(axes, [run.name for run, *_ in gaps])
    axes.set_xlim(-105, 105)
    axes.set_xlabel("text-only minus image accuracy, points")
    return figure
