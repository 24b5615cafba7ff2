"""The tables of an evaluation suite in LaTeX."""

import textwrap
from collections.abc import Sequence

import pandas as pd

from safervlm.io.escape import for_latex, visible
from safervlm.io.tables import JUDGE_NOTE
from safervlm.reports.latex import latex_table
from safervlm.reports.suite_tables import (
    DIVERSITY_NOTE,
    LEVEL,
    counts_without_answer,
    coverage_lines,
    interval,
    lines,
    shown_estimate,
)
from safervlm.reports.tables import records
from safervlm.results.suite_columns import GROUPS

# --- LaTeX, page ------------------------------------------------------------------------------------------------------


def suite_latex_tables(long: pd.DataFrame, differences: pd.DataFrame, names: Sequence[str]) -> str:
    """Returns a table per group, then one of the differences, for the booktabs package.

    The group tables have runs as rows, as in the paper; the table of differences has runs as columns.

    Args:
        long: Result of :func:`safervlm.results.suite_estimates.evaluate`, for all runs.
        differences: Result of :func:`safervlm.results.suite_differences.compare_suites`; may be empty.
        names: The runs' names, in the order of the rows; the first is the original.
    """
    found = {(row["run"], row["column"], row["sampling_unit"]): row for row in records(long)}
    tables = []
    for group in GROUPS:
        cells: dict[str, list[list[str]]] = {}  # heading -> of each run the number and its intervals
        for line in lines(long):
            if line["group"] != group:
                continue
            column = cells.setdefault(line["heading"], [[] for _ in names])
            for cell, name in zip(column, names, strict=True):
                row = found.get((name, line["column"], line["sampling_unit"]))
                if line["first"]:
                    if row:
                        numbers = shown_estimate(row["unit"], row["value"]), interval(row)
                        cell += [*numbers, *counts_without_answer(row)]
                    else:
                        cell.append("-")
                elif row:
                    cell.append(interval(row).replace("[", "(").replace("]", ")"))
        if cells:
            stacked = {
                _stack(textwrap.wrap(heading, 13)): [_stack(cell, small=True) for cell in column]
                for heading, column in cells.items()
            }
            caption = (
                f"{group}: in percent (MME in points), N/A counted as wrong. 95 % intervals: in brackets for new "
                "concepts or new images, in parentheses for other images of these concepts. "
                f"{JUDGE_NOTE} {DIVERSITY_NOTE}"
            )
            table = pd.DataFrame(stacked, pd.Index([for_latex(name) for name in names]))
            tables.append(latex_table(table, "l" + "r" * len(stacked), caption, index=True, escape=False))
    if len(differences):
        rows = differences[~differences["detail"]]
        texts = {
            (row["heading"], row["run"]): (
                f"{shown_estimate(row['unit'], row['difference'], signed=True)}{'*' if row['p_holm'] < LEVEL else ''} "
                f"{interval(row, signed=True)}"
            )
            for row in records(rows)
        }
        table = pd.Series(texts).unstack(sort=False)[[name for name in names if name in set(rows["run"])]].fillna("-")
        caption = (
            f"Differences from {names[0]} on the same items, in percentage points (MME in points), with 95 % "
            f"intervals; * p, by Holm over a run's columns, below {LEVEL:g}. {JUDGE_NOTE}"
        )
        tables.append(latex_table(table, "l" + "r" * len(table.columns), caption, index=True))
    made = [
        f"% {visible(line)}"
        for line in coverage_lines(long) + (coverage_lines(differences) if len(differences) else [])
    ]
    return "\n".join(["% \\usepackage{booktabs}", "% How the intervals are made:", *made, "", *tables])


def _stack(parts: Sequence[str], small: bool = False) -> str:
    """Stacks texts vertically in LaTeX; all but the first in a smaller font if ``small``."""
    first, *rest = map(for_latex, parts)
    rest = [f"{{\\scriptsize {part}}}" if small else f"{{{part}}}" for part in rest if part]
    return "\\shortstack[r]{" + r"\\".join([first, *rest]) + "}" if rest else first
