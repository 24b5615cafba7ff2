"""The first screen of a report: the result in a sentence, four tiles, and the differences from the first run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from safervlm.reports.findings import Outcome, Result
from safervlm.reports.plots import forest_plot
from safervlm.reports.suite_tables import GENERAL
from safervlm.reports.tables import percent, records

TILES = 4


def first_screen(headline: Sequence[str], findings: Sequence[Result], differences: pd.DataFrame) -> dict[str, Any]:
    """Prepares the first screen for the template.

    Args:
        headline: Its sentences, the last of which is about their intervals.
        findings: The measures of all runs, the most important first.
        differences: Result of :func:`safervlm.results.suite_differences.compare_suites`, for all evaluations; may
            be empty.

    Returns:
        ``headline`` (sentences), ``note``, ``tiles`` and ``forest`` (a plot, or None).
    """
    names = [each.run for each in findings[0].outcomes] if findings else []
    general = _general_tile(names, differences)
    tiles = [_tile(finding) for finding in findings[: TILES - len(general)] if finding.measured]
    return {
        "headline": headline[:-1],
        "note": headline[-1],
        "tiles": [*tiles, *general],
        "forest": forest_plot(findings),
    }


def _tile(finding: Result) -> dict[str, Any]:
    rows = [{"index": index, "run": each.run, **_texts(each)} for index, each in enumerate(finding.outcomes)]
    return {"title": finding.title, "hint": finding.unit, "rows": rows}


def _texts(outcome: Outcome) -> dict[str, str]:
    number = outcome.number
    if number is None:
        return {"value": "-", "ends": "not measured"}
    ends = "" if np.isnan(number.low) else f"[{percent(number.low)}, {percent(number.high)}]"
    if outcome.only_na:
        ends = "all N/A"
    elif not np.isnan(outcome.judged):
        ends = f"{ends} judged {percent(outcome.judged)}"
    return {"value": percent(number.value), "ends": ends}


def _general_tile(names: Sequence[str], differences: pd.DataFrame) -> list[dict[str, Any]]:
    """The most that each run may have lost in any dataset of general ability in percent; no tile without a bound."""
    if differences.empty:
        return []
    table = differences[(differences["group"] == GENERAL) & (differences["unit"] == "%") & ~differences["detail"]]
    rows = []
    for index, name in enumerate(names):
        bounds = records(table[(table["run"] == name) & table["low"].notna()])
        if bounds:
            worst = min(bounds, key=lambda row: row["low"])
            heading = worst["heading"].partition(":")[0]
            rows.append(
                {
                    "index": index,
                    "run": name,
                    "value": percent(max(-worst["low"], 0.0)),
                    "ends": heading,
                }
            )
    return [{"title": GENERAL, "hint": "most points lost", "rows": rows}] if rows else []
