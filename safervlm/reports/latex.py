"""The tables of a report in LaTeX."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from safervlm.io.escape import for_latex
from safervlm.io.tables import BESIDE_CORRECTED, JUDGE_NOTE, escaped
from safervlm.reports.corrected import CORRECTED_NOTE, corrected_rows
from safervlm.reports.runs import Run
from safervlm.reports.tables import bracketed, percent, records, shown, with_interval
from safervlm.results.measures import COLUMNS, GAP_WEIGHTS
from safervlm.results.scores import by_category, interval_rows
from safervlm.statistics.diversity import SUBSAMPLES, TEXTS

# --- LaTeX ------------------------------------------------------------------------------------------------------------


def latex_tables(runs: Sequence[Run], comparison: pd.DataFrame, corrected: pd.DataFrame) -> str:
    """Returns the overall table, the corrected rates and each run's accuracies by category, for the booktabs package.

    Args:
        runs: The runs.
        comparison: Result of :func:`safervlm.results.scores.compare`, for the same runs.
        corrected: Result of :func:`safervlm.reports.corrected.corrected_rates`, for the same runs; may be empty.
    """
    people = corrected_rows(corrected)
    beside = {(row["run"], row["rate"]): row for row in people if not row["minus"]}
    cells = {
        str(name): _overall(run, row, beside)
        | {"N/A": percent(row["na_rate"]), "thinking unfinished": str(row["thinking_unfinished"])}
        | {"answers": str(row["n"])}
        for name, row, run in zip(comparison.index, records(comparison), runs, strict=True)
    }
    lines = max(cells.values(), key=len)  # missing intervals of a run are dashes
    side_by_side = pd.DataFrame({name: {line: own.get(line, "-") for line in lines} for name, own in cells.items()})
    caption = (
        "Runs side by side; accuracies, over-flagging and the gap in percent, N/A as wrong unless stated otherwise, "
        "with 95 % intervals for other images of these concepts and for new concepts. "
        f"{BESIDE_CORRECTED if people else JUDGE_NOTE} {GAP_WEIGHTS} "
        f"1 - self-BLEU: mean over {SUBSAMPLES} subsamples of {TEXTS} texts (of all, if there are fewer)."
    )
    if people:
        caption += " Corrected: for the judge's error with people's labels, with its interval for new concepts."
    tables = [latex_table(side_by_side, "l" + "r" * len(runs), caption, index=True)]
    if people:
        tables.append(_corrected(people))
    for run in runs:
        rows = [
            {
                "capability": row["capability"].replace("_", " "),
                "side": row["side"],
                "category": row["category"],
                "n": str(row["n"]),
                "N/A": percent(row["na_rate"]),
                "thinking unfinished": str(row["thinking_unfinished"]),
                "N/A as wrong": with_interval(row["accuracy_na_wrong"], row["low_na_wrong"], row["high_na_wrong"]),
                "N/A excluded": with_interval(row["accuracy"], row["low"], row["high"]),
                "sampling_unit": row["sampling_unit"],
                "method": row["method"],
            }
            for row in records(by_category(run.scores))
        ]
        caption = f"{run.name}: accuracy in percent with 95 % intervals. {JUDGE_NOTE}"
        tables.append(latex_table(pd.DataFrame(rows), "lllrrrrrll", caption, index=False))
    return "% \\usepackage{booktabs}\n\n" + "\n".join(tables)


def _overall(run: Run, row: dict[str, Any], people: dict[tuple[str, str], dict[str, Any]]) -> dict[str, str]:
    """The cells of a run: its numbers, and below each the intervals and the corrected rate."""
    cells = {}
    for column, (heading, measure, _, _) in COLUMNS.items():
        cells[heading] = shown(measure, row[column])
        if not column.endswith("_na_left_out"):
            for sampling_unit, found in interval_rows(run.scores, column).items():
                cells[f"{heading}: {sampling_unit}"] = bracketed(found)
            if rate := people.get((run.name, heading)):
                cells[f"{heading}: corrected"] = f"{rate['corrected']} {rate['new_concepts']}"
    return cells


def _corrected(rows: Sequence[dict[str, Any]]) -> str:
    """The table of corrected rates and of their differences from the first run."""
    headings = {
        "rate": "rate",
        "judged": "as judged",
        "corrected": "corrected",
        "this_run": "this run",
        "new_concepts": "new concepts",
        "labels": "labels",
        "responses": "responses",
        "thinking_unfinished": "thinking unfinished",
    }
    table = pd.DataFrame(
        {"run": f"{row['run']} - {row['minus']}" if row["minus"] else row["run"]}
        | {heading: row[key] for key, heading in headings.items()}
        for row in rows
    )
    caption = (
        f"Rates corrected for the judge's error, in percent; of two runs the difference in points. {CORRECTED_NOTE}"
    )
    return latex_table(table, "llrrrrrrr", caption, index=False)


def latex_table(table: pd.DataFrame, columns: str, caption: str, index: bool, escape: bool = True) -> str:
    """Formats a table for the booktabs package.

    Args:
        table: Table of texts.
        columns: LaTeX's column specification, including the row names' column if ``index``.
        caption: Plain text, which is escaped.
        index: Whether the row names are a column.
        escape: Whether the table's texts are plain and to be escaped; False if they are LaTeX already.

    Returns:
        A LaTeX table environment.
    """
    written = escaped(table, for_latex) if escape else table
    return written.to_latex(escape=False, column_format=columns, caption=for_latex(caption), index=index)
