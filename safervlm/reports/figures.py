"""Plots of a report, as SVG."""

import io
import re
import warnings as python_warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from safervlm.hashing import fingerprint
from safervlm.io.escape import for_figure
from safervlm.reports.runs import Run, interval_row
from safervlm.reports.tables import records
from safervlm.results.measures import COLUMNS, OVERALL, THESE_CONCEPTS, concept_gaps, modality_gap
from safervlm.results.scores import by_category, category_order, overall

WIDTH = 11.0  # width of every plot in inches

# The colours of the page's light theme. In a page, :func:`svg` replaces each by a CSS variable, for both themes.
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


def figures(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Draws the page's plots; plots without data are omitted.

    Args:
        runs: the runs, in the order of their colours.

    Returns:
        Name -> title, description (also the text alternative) and svg.
    """
    drawn: dict[str, dict[str, Any]] = {}
    plots: dict[str, tuple[str, str, Callable[[Sequence[Run]], Figure | None]]] = {
        "overall": (
            "Accuracy, overall",
            "N/A counted as wrong. Lines are 95 % intervals for new concepts, or for these concepts where there are "
            "too few for the former.",
            plot_overall,
        ),
        "categories": (
            "Unsafe concepts by category, by name and by image",
            "N/A counted as wrong. Lines are 95 % intervals for these concepts. The distance between a run's points in "
            "the two panels is its modality gap.",
            plot_categories,
        ),
        "gap": (
            "Modality gap of every concept",
            "Accuracy on the concept's name minus accuracy on its images, N/A as wrong; a dot a concept. The large "
            "marker is the mean with its 95 % interval for new concepts.",
            plot_gap,
        ),
    }
    for name, (title, description, draw) in plots.items():
        with mpl.rc_context(STYLE):
            figure = draw(runs)
            if figure is not None:
                drawn[name] = {"title": title, "description": description, "svg": svg(figure)}
    return drawn


def svg(figure: Figure) -> Markup:
    """Converts a figure to SVG to be embedded in a page, with the page's colours and fonts.

    Args:
        figure: drawn with :data:`STYLE`, whose colours are replaced by the page's CSS variables.

    Returns:
        The SVG element; identical for identical figures.
    """
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with python_warnings.catch_warnings():
        # Matplotlib's font may lack characters of a name; the browser renders them with its own fonts.
        python_warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        python_warnings.filterwarnings("ignore", "Matplotlib currently does not support .* natively", UserWarning)
        figure.savefig(buffer, format="svg", metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    colours = {INK: "ink", GRID: "grid"} | {colour: f"run-{index}" for index, colour in enumerate(RUN_COLOURS)}
    # Matplotlib reuses the same ids in every figure; a prefix makes them unique within the page.
    prefix = f"f{fingerprint(text)[:6]}-"

    def adapted(tag: re.Match[str]) -> str:
        changed = re.sub("|".join(colours), lambda colour: f"var(--{colours[colour[0]]})", tag[0])
        return re.sub(r' id="|href="#|url\(#', lambda start: start[0] + prefix, changed)

    return Markup(re.sub("<[^>]*>", adapted, text))  # noqa: S704 (Matplotlib escapes every text that it draws)


def _style(index: int) -> dict[str, Any]:
    kind = index % len(MARKERS)
    return {"color": RUN_COLOURS[kind], "marker": MARKERS[kind], "markersize": 6, "linestyle": "none"}


def _dots(axes: Axes, index: int, count: int, rows: Sequence[tuple[int, float, float, float]]) -> None:
    """Draws one run's estimates: (line, value, low, high) in shares; the runs' dots of a line are offset vertically."""
    shift = 0.62 * ((index + 0.5) / count - 0.5)
    for line, _, low, high in rows:
        if not np.isnan(low):
            axes.plot(
                [100 * low, 100 * high], [line + shift] * 2, color=RUN_COLOURS[index % len(MARKERS)], linewidth=1.6
            )
    places, values = [line + shift for line, *_ in rows], [100 * value for _, value, *_ in rows]
    axes.plot(values, places, **_style(index))


def _lines(axes: Axes, labels: Sequence[str]) -> None:
    """Labels the lines of a plot from top to bottom, and sets the range of its percent axis."""
    axes.set_yticks(range(len(labels)), [for_figure(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(-2, 102)


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    if len(runs) > 1:
        dots = [Line2D([], [], **_style(index)) for index in range(len(runs))]
        labels = [for_figure(run.name) for run in runs]
        columns = min(len(runs), max(1, 120 // (max(map(len, labels)) + 6)), 6)
        figure.legend(dots, labels, loc="outside upper left", ncols=columns)


def plot_overall(runs: Sequence[Run]) -> Figure | None:
    """Plots the four overall accuracies with their intervals.

    Args:
        runs: the runs, in the order of their colours.

    Returns:
        The figure; None if no accuracy was measured.
    """
    columns = ["perception", "text_only_unsafe", "image_unsafe", "image_safe"]
    columns = [column for column in columns if any(overall(run.scores, column) is not None for run in runs)]
    if not columns:
        return None
    figure = Figure(figsize=(WIDTH, 0.8 + len(columns) * (0.35 + 0.17 * len(runs))), layout="constrained")
    axes = figure.subplots()
    for index, run in enumerate(runs):
        rows = [interval_row(run.scores, column) for column in columns]
        dots = [(i, row["value"], row["low"], row["high"]) for i, row in enumerate(rows) if row is not None]
        _dots(axes, index, len(runs), dots)
    _lines(axes, [COLUMNS[column][0] for column in columns])
    axes.set_xlabel("accuracy in %")
    _legend(figure, runs)
    return figure


def plot_categories(runs: Sequence[Run]) -> Figure | None:
    """Plots the accuracy on unsafe concepts by category, with a panel for names and one for images.

    Args:
        runs: the runs, in the order of their colours.

    Returns:
        The figure; None if neither was measured.
    """
    tables = [by_category(run.scores) for run in runs]
    tables = [table[(table["side"] == "unsafe") & (table["sampling_unit"] == THESE_CONCEPTS)] for table in tables]
    everything = pd.concat(tables)
    panels = [
        (capability, title)
        for capability, title in (("alignment_text_only", "by name (text only)"), ("alignment", "by image"))
        if capability in set(everything["capability"])
    ]
    if not panels:
        return None
    found = set(everything["category"]) - {OVERALL}
    categories = [*sorted(found, key=category_order), OVERALL]
    height = 1.0 + len(categories) * (0.2 + 0.11 * len(runs))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    for axes, (capability, title) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for index, table in enumerate(tables):
            part = table[table["capability"] == capability]
            dots = [
                (categories.index(row["category"]), row["accuracy_na_wrong"], row["low_na_wrong"], row["high_na_wrong"])
                for row in records(part)
            ]
            _dots(axes, index, len(runs), dots)
        _lines(axes, categories)
        axes.set_title(title)
        axes.set_xlabel("accuracy in %")
    _legend(figure, runs)
    return figure


def plot_gap(runs: Sequence[Run]) -> Figure | None:
    """Plots the modality gap of every concept, one line of dots per run, with the mean and its interval.

    Args:
        runs: the runs, in the order of their colours.

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
        places = line - 0.02 + 0.45 * _spread(points)
        axes.plot(100 * points, places, **{**style, "markersize": 4, "alpha": 0.55, "markeredgewidth": 0})
        if not np.isnan(mean.low):
            axes.plot([100 * mean.low, 100 * mean.high], [line - 0.26] * 2, color=style["color"], linewidth=2)
        axes.plot([100 * mean.value], [line - 0.26], **{**style, "markersize": 8})
    axes.axvline(0, color=INK, linewidth=0.8)
    _lines(axes, [run.name for run, *_ in gaps])
    axes.set_xlim(-105, 105)
    axes.set_xlabel("text-only minus image accuracy, points")
    return figure


def _spread(points: np.ndarray) -> np.ndarray:
    """Returns vertical offsets from 0 to 1 that separate points with the same value, (n,)."""
    heights = np.zeros(len(points))
    for value in np.unique(points.round(2)):
        same = np.flatnonzero(points.round(2) == value)
        heights[same] = np.linspace(0, min(1, (len(same) - 1) / 10), len(same))
    return heights
