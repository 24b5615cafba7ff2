"""The plots of a page: lines of points with intervals, which the templates draw as SVG.

Positions are percentages of the plot's width, so a plot fits every screen and its texts keep their size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from safervlm.reports.findings import LESS, Number, Outcome, Result
from safervlm.reports.runs import Run
from safervlm.reports.tables import percent, records, signed
from safervlm.results.measures import OVERALL, THESE_CONCEPTS, concept_gaps, modality_gap
from safervlm.results.scores import by_category, category_order

STEPS = (5, 10, 20, 25, 50)  # points between two grid lines
MOST_STEPS = 6
LINES = 16  # lines of the first screen's plot
FEWEST, MOST = 3, 8  # minimum and maximum number of its measures
PITCH, NARROW = 17, 11  # pixels between two runs
MARGIN = 2.0  # percent of the width at both sides of the range


@dataclass(frozen=True, slots=True)
class Scale:
    """The horizontal axis of a plot, in points.

    Attributes:
        low: Its left end.
        high: Its right end.
        step: Distance of two grid lines.
        signed: Whether positive numbers have a plus sign.
    """

    low: float
    high: float
    step: float
    signed: bool = False

    @classmethod
    def around(cls, numbers: Sequence[float]) -> "Scale":
        """Returns a scale for differences: it contains 0 and all numbers.

        Args:
            numbers: In points; NaN is ignored.
        """
        there = [0.0, *(number for number in numbers if not np.isnan(number))]
        span = max(there) - min(there)
        step = next((step for step in STEPS if span / step <= MOST_STEPS - 1), STEPS[-1])
        low, high = step * np.floor(min(there) / step), step * np.ceil(max(there) / step)
        return cls(float(low), float(high if high > low else low + step), step, signed=True)

    def place(self, number: float) -> float:
        """Returns the position of a number, in percent of the width.

        Args:
            number: In points.
        """
        share = (number - self.low) / (self.high - self.low)
        return round(MARGIN + (100 - 2 * MARGIN) * share, 2)

    @property
    def ticks(self) -> list[dict[str, Any]]:
        """Grid lines: at (position) and text."""
        numbers = np.arange(self.low, self.high + self.step / 2, self.step)
        form = "+.0f" if self.signed else ".0f"
        return [
            {"at": self.place(float(x)), "text": f"{x:{form}}" if x else "0", "zero": self.signed and x == 0}
            for x in numbers
        ]


PERCENTAGES = Scale(0, 100, 20)


# --- marks ------------------------------------------------------------------------------------------------------------


def _mark(index: int, number: Number, scale: Scale, y: float, **more: Any) -> dict[str, Any]:
    """A point of a run with its interval: its position, the interval's ends (None without one), and the run's index."""
    ends = {
        name: None if np.isnan(end) else scale.place(100 * end)
        for name, end in (("low", number.low), ("high", number.high))
    }
    return {"run": index, "x": scale.place(100 * number.value), "y": y, **ends, **more}


def _said(number: Number, with_sign: bool) -> str:
    form = signed if with_sign else percent
    interval = "" if np.isnan(number.low) else f" [{form(number.low)}, {form(number.high)}]"
    return f"{form(number.value)}{interval}"


def line_of(
    label: str, numbers: Sequence[tuple[int, str, Number]], scale: Scale, hint: str = "", pitch: int = PITCH
) -> dict[str, Any]:
    """Returns a line of a plot: one point per run, with offsets.

    Args:
        label: Label of the line.
        numbers: Index and name of each run, and its number.
        scale: The axis.
        hint: A note on the label.
        pitch: Pixels between two runs.
    """
    marks = [
        _mark(index, number, scale, 9 + pitch * place, said=_said(number, scale.signed))
        for place, (index, _, number) in enumerate(numbers)
    ]
    described = "; ".join(f"{name} {_said(number, scale.signed)}" for _, name, number in numbers)
    height = 18 + pitch * (len(numbers) - 1)
    return {"label": label, "hint": hint, "marks": marks, "dots": [], "height": height, "description": described or "-"}


def figure(title: str, description: str, panels: Sequence[dict[str, Any]], runs: Sequence[int]) -> dict[str, Any]:
    """Returns a plot for the template.

    Args:
        title: Title of the plot.
        description: Description of its content.
        panels: Result of :func:`panel_of`.
        runs: Indices of the runs in its legend.
    """
    return {"title": title, "description": description, "panels": panels, "runs": list(runs)}


# --- plots ------------------------------------------------------------------------------------------------------------


def forest_plot(findings: Sequence[Result]) -> dict[str, Any] | None:
    """Returns the plot of differences from the first run, or of the values of a single run.

    Args:
        findings: The measures, the most important first; as many as fit on the first screen are shown.

    Returns:
        The plot for the template; None if there is nothing to show.
    """

    def numbers(finding: Result) -> list[tuple[int, Outcome, Number]]:
        pairs = [(i, each, each.difference if differences else each.number) for i, each in enumerate(finding.outcomes)]
        return [(i, each, number) for i, each, number in pairs if number is not None]

    differences = any(each.difference for finding in findings for each in finding.outcomes)
    shown = [finding for finding in findings if numbers(finding)]
    if not shown:
        return None
    most = max(FEWEST, min(MOST, LINES // max(len(numbers(finding)) for finding in shown)))
    shown = shown[:most]
    ends = [100 * x for f in shown for _, _, n in numbers(f) for x in (n.value, n.low, n.high)]
    scale = Scale.around(ends) if differences else PERCENTAGES
    lines = [
        line_of(
            finding.title,
            [(index, each.run, number) for index, each, number in numbers(finding)],
            scale,
            LESS if LESS in finding.unit else "",
        )
        for finding in shown
    ]
    first = findings[0].outcomes[0].run
    title = f"Differences from {first}" if differences else "Values"
    description = (
        "In points, on the same questions, with 95 % intervals. A line that crosses 0 is compatible with no difference."
        if differences
        else "In percent, with 95 % intervals."
    )
    described = sorted({index for finding in shown for index, *_ in numbers(finding)})
    return figure(title, description, [panel_of("", lines, scale)], described)


def panel_of(title: str, lines: Sequence[dict[str, Any]], scale: Scale, texts: bool = True) -> dict[str, Any]:
    """Returns a panel of a plot.

    Args:
        title: Heading; empty for none.
        lines: Result of :func:`line_of`.
        scale: The axis.
        texts: Whether the numbers are written beside the lines.
    """
    return {"title": title, "lines": lines, "ticks": scale.ticks, "texts": texts}


def category_plot(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Returns the plot of the accuracy on unsafe concepts by category: a panel for images, one for names.

    Args:
        runs: The runs.

    Returns:
        The plot for the template; None if neither was measured.
    """
    tables = [by_category(run.scores) for run in runs]
    tables = [table[(table["side"] == "unsafe") & (table["sampling_unit"] == THESE_CONCEPTS)] for table in tables]
    there = pd.concat(tables)
    categories = [*sorted(set(there["category"]) - {OVERALL}, key=category_order), OVERALL]
    panels = []
    for capability, title in (("alignment", "By image"), ("alignment_text_only", "By name")):
        if capability not in set(there["capability"]):
            continue
        found = [
            {row["category"]: row for row in records(table[table["capability"] == capability])} for table in tables
        ]
        lines = [
            line_of(category, _of_category(runs, found, category), PERCENTAGES, pitch=NARROW) for category in categories
        ]
        panels.append(panel_of(title, [line for line in lines if line["marks"]], PERCENTAGES, texts=False))
    if not panels:
        return None
    description = (
        "Correct answers in percent, N/A as wrong, with 95 % intervals for these concepts. The distance between a "
        "run's points in the two panels is its modality gap."
    )
    return figure("Unsafe concepts by category", description, panels, range(len(runs)))


def _of_category(
    runs: Sequence[Run], found: Sequence[dict[str, dict[str, Any]]], category: str
) -> list[tuple[int, str, Number]]:
    return [
        (index, run.name, Number(row["accuracy_na_wrong"], row["low_na_wrong"], row["high_na_wrong"]))
        for index, (run, rows) in enumerate(zip(runs, found, strict=True))
        if (row := rows.get(category)) is not None and not np.isnan(row["accuracy_na_wrong"])
    ]


def gap_plot(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Returns the plot of every concept's modality gap, a line per run, with the mean and its interval.

    Args:
        runs: The runs.

    Returns:
        The plot for the template; None if no run has concepts with both names and images.
    """
    scale = Scale(-100, 100, 50, signed=True)
    lines = []
    for index, run in enumerate(runs):
        points, gap = concept_gaps(run.frame)["gap"].to_numpy(float), modality_gap(run.frame)
        if not len(points):
            continue
        mean = Number(gap.value, gap.low, gap.high)
        line = line_of(run.name, [(index, run.name, mean)], scale)
        line["dots"] = [
            {"run": index, "x": scale.place(100 * x), "y": round(22 + 16 * y, 1)}
            for x, y in zip(points.tolist(), offsets_of(points).tolist(), strict=True)
        ]
        line["height"], line["description"] = 44, f"mean of {len(points)} concepts {_said(mean, True)}"
        lines.append(line)
    if not lines:
        return None
    description = (
        "Correct by name minus correct by image, in points, N/A as wrong; a dot per concept. The large mark: the mean, "
        "with its 95 % interval for new concepts."
    )
    return figure("Modality gap of every concept", description, [panel_of("", lines, scale)], [])


def offsets_of(points: np.ndarray) -> np.ndarray:
    """Returns vertical offsets from 0 to 1 that separate points with the same value, (n,).

    Args:
        points: (n,) the values.
    """
    heights = np.zeros(len(points))
    for value in np.unique(points.round(2)):
        same = np.flatnonzero(points.round(2) == value)
        heights[same] = np.linspace(0, min(1, (len(same) - 1) / 10), len(same))
    return heights
