"""The plot of the operating curves of a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from safervlm.reports.operating import overall_row
from safervlm.reports.runs import Run
from safervlm.results.operating import AUROC, RATES, Images, read_odds, with_odds


def curve_plot(runs: Sequence[Run], tables: Mapping[str, pd.DataFrame]) -> dict[str, Any] | None:
    """Returns the operating curves of the runs' log-odds, with the operating points of their answers.

    Args:
        runs: The runs, in the order of their colours.
        tables: Result of :func:`safervlm.reports.operating.operating_tables`.

    Returns:
        The plot for the template, with coordinates in percent and the vertical axis downwards; None if no run has odds
        of both unsafe and safe images.
    """
    drawn = [
        found
        for index, run in enumerate(runs)
        if run.name in tables and (found := _of_run(index, run, tables[run.name])) is not None
    ]
    if not drawn:
        return None
    description = (
        "Images whose mean log-odds of the word that means unsafe are at least a threshold, in percent of the unsafe "
        "and of the safe images. Vertical lines: 95 % intervals for new concepts at FPR 1, 5 and 10 %. Marks: the "
        "answers' operating points; the distance below the curve is what the log-odds show but the answers do not."
    )
    return {"title": "Operating curve", "description": description, "runs": drawn}


def _of_run(index: int, run: Run, table: pd.DataFrame) -> dict[str, Any] | None:
    rows = with_odds(run.frame, read_odds(run.folder))
    images = Images.of(rows[rows["capability"] == "alignment"])
    if images is None:
        return None
    points = images.curve()
    steps, last = [(0.0, 100.0)], 100.0
    for tpr, fpr in zip(points.tpr, points.fpr, strict=True):
        steps += [(round(100 * fpr, 2), last), (round(100 * fpr, 2), round(100 - 100 * tpr, 2))]
        last = steps[-1][1]
    bars = []
    for name, fpr in RATES.items():
        row = overall_row(table, name)
        if row is not None and not np.isnan(row["low"]):
            ends = {end: round(100 - 100 * float(row[end]), 2) for end in ("low", "high")}
            bars.append({"x": 100 * fpr + 0.5 * index} | ends)  # next to those of other runs
    tpr, fpr = images.answers()
    answers = None if np.isnan(tpr + fpr) else {"x": round(100 * fpr, 2), "y": round(100 - 100 * tpr, 2)}
    area = overall_row(table, AUROC)
    said = "" if area is None else f"AUROC {area['value']:.3f}"
    said += "" if answers is None else f", answers TPR {100 * tpr:.1f} % at FPR {100 * fpr:.1f} %"
    return {
        "index": index,
        "points": " ".join(f"{x:g},{y:g}" for x, y in steps),
        "bars": bars,
        "answers": answers,
        "said": said,
    }
