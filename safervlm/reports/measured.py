"""The sections of a page about measurements: overall, modality gap, categories."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from safervlm.reports.corrected import CORRECTED_NOTE, corrected_rows
from safervlm.reports.plots import category_plot, gap_plot
from safervlm.reports.runs import Run, interval_row
from safervlm.reports.tables import records, shown, signed
from safervlm.results.common import difference_from
from safervlm.results.measures import (
    ACCURACY_NA_WRONG,
    COLUMNS,
    DIVERSITY,
    MEASURES,
    OVERALL,
    SHOWN,
    THESE_CONCEPTS,
    Estimate,
    concept_gaps,
    modality_gap,
)
from safervlm.results.scores import by_category, category_order, interval_rows, overall
from safervlm.statistics.diversity import TOO_FEW

OPEN_RUNS = 4  # number of runs up to which gaps and categories are not folded


def measured_sections(
    runs: Sequence[Run], comparison: pd.DataFrame, corrected: pd.DataFrame, folded: bool = False
) -> dict[str, Any]:
    """Prepares the sections for the template.

    Args:
        runs: The runs; the first is the baseline.
        comparison: Result of :func:`safervlm.results.scores.compare`.
        corrected: Result of :func:`safervlm.reports.corrected.corrected_rates`.
        folded: Whether gaps and categories are folded for any number of runs.
    """
    return {
        "overall": overall_cells(runs, comparison, corrected),
        "corrected": corrected_rows(corrected),
        "corrected_unfinished": bool(corrected["thinking_unfinished"].any()),
        "corrected_note": CORRECTED_NOTE,
        "gap_plot": gap_plot(runs),
        "folded": folded or len(runs) > OPEN_RUNS,
        "gaps": [(run.name, modality_gap(run.frame), concept_gaps(run.frame), unfinished_in_gap(run)) for run in runs],
        "category_plot": category_plot(runs),
        "categories": [
            (
                run.name,
                [records(part) for _, part in by_category(run.scores).groupby(["capability", "side"], sort=False)],
            )
            for run in runs
        ],
        "side_by_side": side_by_side(runs),
        "others": [other_rows(run.scores) for run in runs],
    }


def overall_cells(runs: Sequence[Run], comparison: pd.DataFrame, corrected: pd.DataFrame) -> dict[str, Any]:
    """Prepares the overall table for the template.

    A difference from the first run is shown only if both are comparable (:mod:`safervlm.results.common`).

    Args:
        runs: The runs; the first is the baseline.
        comparison: Result of :func:`safervlm.results.scores.compare`, for the same runs.
        corrected: Result of :func:`safervlm.reports.corrected.corrected_rates`.

    Returns:
        ``headings``: pairs of a column and its heading; ``rows``: per run its name and cells, in the same order;
        ``counts``: key, heading and a value per run of the share of N/A and the numbers of responses.
    """
    values = records(comparison)
    beside = {(row["run"], row["rate"]): row for row in corrected_rows(corrected) if not row["minus"]}
    rows = []
    for run, row in zip(runs, values, strict=True):
        cells = []
        for column in SHOWN:
            measure, left_out = COLUMNS[column][1], row.get(f"{column}_na_left_out")
            source = interval_row(run.scores, column)
            change = None if run is runs[0] else difference_from(run.frame, runs[0].frame, column)
            people = beside.get((run.name, COLUMNS[column][0]))
            cells.append(
                {
                    "column": column,
                    "value": row[column],
                    "shown": shown(measure, row[column]),
                    "intervals": [
                        {"of": sampling_unit.removesuffix(" concepts"), "low": found["low"], "high": found["high"]}
                        for sampling_unit, found in interval_rows(run.scores, column).items()
                    ],
                    "corrected": people and f"{people['corrected']} {people['new_concepts'].removeprefix('-')}".strip(),
                    "method": ""
                    if source is None
                    else f"{source['sampling_unit']}; {source['method']}".removeprefix("; "),
                    "difference": None
                    if change is None or np.isnan(change.value)
                    else signed(change.value, measure == DIVERSITY),
                    "paired": "" if change is None else paired(change),
                    "left_out": None if left_out is None or np.isnan(left_out) else left_out,
                    "published": row.get(f"{column}_published"),
                    "fewer": source["n"] if source is not None and source["method"] == TOO_FEW else None,
                }
            )
        rows.append({"name": run.name, "cells": cells})
    counts = [("na_rate", "N/A"), ("n", "Responses")]
    if comparison["thinking_unfinished"].any():
        counts.append(("thinking_unfinished", "Thinking unfinished"))
    return {
        "headings": [(column, COLUMNS[column][0]) for column in SHOWN],
        "rows": rows,
        "counts": [(key, heading, [row[key] for row in values]) for key, heading in counts],
    }


def paired(change: Estimate) -> str:
    """Formats the 95 % interval of a difference over new concepts, in percentage points; empty if there is none.

    Args:
        change: Result of :func:`safervlm.results.common.difference_from`.
    """
    return "" if np.isnan(change.low) else f"[{signed(change.low)}, {signed(change.high)}]"


def unfinished_in_gap(run: Run) -> int:
    """Returns the number of responses with unfinished thinking that the modality gap excludes.

    Args:
        run: The run.
    """
    row = overall(run.scores, "modality_gap")
    return 0 if row is None else int(row["thinking_unfinished"])


def side_by_side(runs: Sequence[Run]) -> dict[str, list[dict[str, Any] | None]]:
    """Tabulates the runs' accuracies on unsafe images by category.

    Args:
        runs: The runs.

    Returns:
        Category -> for each run its row of :func:`safervlm.results.scores.by_category`; None if it has none.
    """
    tables = []
    for run in runs:
        table = by_category(run.scores)
        these = (
            (table["sampling_unit"] == THESE_CONCEPTS)
            & (table["side"] == "unsafe")
            & (table["capability"] == "alignment")
        )
        tables.append({row["category"]: row for row in records(table[these])})
    found = set().union(*tables) - {OVERALL}
    return {name: [table.get(name) for table in tables] for name in (*sorted(found, key=category_order), OVERALL)}


def other_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the rows on over-flagging, modality gap and diversity of a run, each with a title.

    Args:
        table: Result of :func:`safervlm.results.scores.scores`.
    """
    rows = table[(table["category"] == OVERALL) & ~table["measure"].isin(["accuracy", ACCURACY_NA_WRONG])]
    return [row | {"title": MEASURES[row["measure"]]} for row in records(rows)]
