"""The first screen of a report: the result in a sentence, four tiles, and the differences from the first run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from safervlm.reports.findings import Outcome, Result
from safervlm.reports.plots import forest_plot
from safervlm.reports.suite_tables import GENERAL
from safervlm.reports.tables import percent, records

TILES = 4


def first_screen(
    headline: Sequence[str],
    findings: Sequence[Result],
    differences: pd.DataFrame,
    groups: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Prepares the first screen for the template.

    Args:
        headline: Its sentences, the last of which is about their intervals.
        findings: The measures of all runs, or of groups of them, the most important first.
        differences: Result of :func:`safervlm.results.suite_differences.compare_suites`, for all evaluations; may
            be empty.
        groups: Name of each group of training seeds in ``findings`` -> names of its runs; may be empty.

    Returns:
        ``headline`` (sentences), ``note``, ``runs`` (the runs or groups that follow), ``tiles`` and ``forest`` (a plot,
        or None).
    """
    outcomes = findings[0].outcomes if findings else ()
    general = _general_tile({_name(each): groups.get(each.group, [each.run]) for each in outcomes}, differences)
    tiles = [_tile(finding) for finding in findings[: TILES - len(general)] if finding.measured]
    return {
        "headline": headline[:-1],
        "note": headline[-1],
        "runs": [{"name": each.run} for each in outcomes],
        "tiles": [*tiles, *general],
        "forest": forest_plot(findings),
    }


def _tile(finding: Result) -> dict[str, Any]:
    rows = [{"index": index, "run": _name(each), **_texts(each)} for index, each in enumerate(finding.outcomes)]
    return {"title": finding.title, "hint": finding.unit, "rows": rows}


def _name(outcome: Outcome) -> str:
    """The name in a tile, which has no room for the number of seeds."""
    return outcome.group or outcome.run


def _texts(outcome: Outcome) -> dict[str, str]:
    number = outcome.number
    if number is None:
        return {"value": "-", "ends": "not measured", "judged": ""}
    ends = "" if np.isnan(number.low) else f"[{percent(number.low)}, {percent(number.high)}]"
    if outcome.only_na:
        ends = "all N/A"
    judged = "" if outcome.only_na or np.isnan(outcome.judged) else f"judged {percent(outcome.judged)}"
    return {"value": percent(number.value), "ends": ends, "judged": judged}


def _general_tile(names: Mapping[str, Sequence[str]], differences: pd.DataFrame) -> list[dict[str, Any]]:
    """The largest possible loss of each run in any dataset of general ability in percent; no tile without a bound.

    Of a group, the most that any of its runs may have lost.
    """
    if differences.empty:
        return []
    table = differences[(differences["group"] == GENERAL) & (differences["unit"] == "%") & ~differences["detail"]]
    rows = []
    for index, (name, runs) in enumerate(names.items()):
        bounds = records(table[table["run"].isin(runs) & table["low"].notna()])
        if bounds:
            worst = min(bounds, key=lambda row: row["low"])
            heading = worst["heading"].partition(":")[0]
            rows.append(
                {
                    "index": index,
                    "run": name,
                    "value": percent(max(-worst["low"], 0.0)),
                    "ends": heading,
                    "judged": "",
                }
            )
    return [{"title": GENERAL, "hint": "most points lost", "rows": rows}] if rows else []
