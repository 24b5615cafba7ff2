"""The tables of an evaluation suite, for the terminal and a page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil, floor
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD

from safervlm.io.tables import EXCLUDED, JUDGE_NOTE, TextTable, terminal
from safervlm.reports.tables import listed, records, shortened
from safervlm.results.measures import THESE_CONCEPTS
from safervlm.results.suite_estimates import NOT_MEASURED
from safervlm.statistics.diversity import SUBSAMPLES, TEXTS

LEVEL = 0.05
DIVERSITY_NOTE = (
    f"1 - self-BLEU: mean over {SUBSAMPLES} subsamples of {TEXTS} texts (of all, if there are fewer); the published "
    "form is of all texts."
)
# Characters of the terminal's table: headings, cells with one decimal, and with whole numbers.
HEADING_WIDTH, CELL_WIDTH, WHOLE_WIDTH = 36, 25, 16
FEW_LINES = (6, 2)  # number of lines of its shortest versions
# Groups of columns; of those of alignment the first existing one.
GENERAL = "General ability"
ALIGNMENT = ("Alignment, all five questions", "Alignment, published draw")

# A manifest as stage -> dotted key -> value; see safervlm.reports.runs.read_summary.
Summary = Mapping[str, Mapping[str, str]]


# --- tables -----------------------------------------------------------------------------------------------------------


def shown_estimate(unit: str, value: float, signed: bool = False, whole: Callable[[float], float] | None = None) -> str:
    """Formats a number for tables: shares and ratios in percent, MME in points, self-BLEU with three decimals.

    Args:
        unit: Result of :attr:`safervlm.results.suite_columns.Column.unit`.
        value: The number; shares and ratios relative to 1. NaN becomes a dash.
        signed: Whether positive numbers have a plus sign.
        whole: How shares and points are rounded to whole numbers; None: they have one decimal.
    """
    if np.isnan(value):
        return "-"
    number, digits = (100 * value, 1) if unit == "%" else (value, 1 if unit == "points" else 3)
    if whole and digits == 1:
        number, digits = whole(round(number, 6)), 0
    rounded = round(number, digits) + 0.0  # no -0.0
    return f"{rounded:{'+' if signed else ''}.{digits}f}"


def interval(row: dict[str, Any], signed: bool = False, whole: bool = False) -> str:
    """Formats the interval of a row, ``[90.2, 97.0]``; empty if there is none.

    Args:
        row: With unit, low and high.
        signed: Whether positive numbers have a plus sign.
        whole: Whether the ends are rounded outwards to whole numbers.
    """
    if np.isnan(row["low"]):
        return ""
    outwards = {"low": floor, "high": ceil} if whole else {"low": None, "high": None}
    ends = (shown_estimate(row["unit"], row[end], signed, how) for end, how in outwards.items())
    return f"[{', '.join(ends)}]"


def estimate_with_interval(row: dict[str, Any], whole: bool = False) -> str:
    """Formats a number with its interval, ``94.1 [90.2, 97.0]``, and the numbers of missing answers or ratings.

    Args:
        row: Result of :func:`safervlm.results.suite_estimates.evaluate`.
        whole: Whether numbers are rounded to whole ones, the interval's ends outwards.
    """
    counts = ", ".join(counts_without_answer(row))
    number = shown_estimate(row["unit"], row["value"], whole=round if whole else None)
    return " ".join(filter(None, (number, interval(row, whole=whole), f"({counts})" if counts else "")))


def counts_without_answer(row: dict[str, Any]) -> list[str]:
    """States how many responses or ratings are missing, and how many responses ended inside their reasoning.

    Args:
        row: Result of :func:`safervlm.results.suite_estimates.evaluate`.
    """
    counts = {"missing": row["missing"], "thinking unfinished": row["thinking_unfinished"]}
    return [f"{count} {what}" for what, count in counts.items() if count]


def lines(long: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the lines of the table, without details.

    A column has a line with its number and the interval for new concepts or new images, and, if available, a second
    line with the interval for these concepts.

    Args:
        long: Result of :func:`safervlm.results.suite_estimates.evaluate`, for all runs.

    Returns:
        Per line: group, column, heading, unit, sampling_unit, and first (whether it is the column's first line).
    """
    measured = long.groupby("column")["method"].transform(lambda methods: (methods != NOT_MEASURED).any())
    rows = long[~long["detail"] & ~(measured & (long["method"] == NOT_MEASURED))]
    rows = rows.drop_duplicates(["column", "sampling_unit"])
    rank = rows.groupby("column", sort=False).ngroup() * 2 + (rows["sampling_unit"] == THESE_CONCEPTS)
    rows = rows.assign(first=rows["sampling_unit"] != THESE_CONCEPTS).iloc[rank.argsort(kind="stable")]
    return records(rows[["group", "column", "heading", "unit", "sampling_unit", "first"]])


def texts(long: pd.DataFrame, names: Sequence[str]) -> dict[str, list[str]]:
    """Formats the table's cells.

    Args:
        long: Result of :func:`safervlm.results.suite_estimates.evaluate`, for all runs.
        names: The runs' names, in the order of the cells.

    Returns:
        Heading of a line -> its cell for each run.
    """
    found = {(row["run"], row["column"], row["sampling_unit"]): row for row in records(long)}
    table = {}
    for line in lines(long):
        rows = [found.get((name, line["column"], line["sampling_unit"])) for name in names]
        heading = line["heading"] if line["first"] else f"{line['heading']}: {line['sampling_unit']}"
        cell = estimate_with_interval if line["first"] else interval
        table[heading] = [(row and cell(row)) or "-" for row in rows]
    return table


def shown_side_by_side(long: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Tabulates runs as rows and the table's lines as columns, each cell with the number and its interval.

    Args:
        long: Result of :func:`safervlm.results.suite_estimates.evaluate`, for all runs.
        names: The runs' names, in the order of the rows.

    Returns:
        Index ``run``; a column per line, and ``excludes``, what the intervals do not include.
    """
    return pd.DataFrame(texts(long, names), pd.Index(names, name="run")).assign(excludes=EXCLUDED)


def evaluation_tables(long: pd.DataFrame, differences: pd.DataFrame, names: Sequence[str]) -> Iterator[TextTable]:
    """Yields the table for the terminal, the most detailed version first.

    It has one column per run and one line per column of the evaluation, without self-BLEU and details. On a narrow
    terminal numbers are rounded to whole ones, intervals outwards. The later versions have fewer runs and lines: first
    those of alignment and general ability.

    Args:
        long: Result of :func:`safervlm.results.suite_estimates.evaluate`, for all runs.
        differences: Result of :func:`safervlm.results.suite_differences.compare_suites`; may be empty.
        names: The runs' names, in the order of the columns; the first is the original.
    """
    every = [line for line in lines(long) if line["first"] and line["unit"] != ""]
    group = next((name for name in ALIGNMENT if any(line["group"] == name for line in every)), "")
    main = [line for line in every if line["group"] in (group, GENERAL)] or every
    width = terminal().width
    fitting = max(1, (width - HEADING_WIDTH) // WHOLE_WIDTH)
    whole = width < HEADING_WIDTH + CELL_WIDTH * min(len(names), fitting)
    for chosen in (every, main, *(main[:number] for number in FEW_LINES)):
        yield _evaluation_table(chosen, len(every), long, differences, names, fitting, whole)


def _evaluation_table(
    chosen: Sequence[dict[str, Any]],
    every: int,
    long: pd.DataFrame,
    differences: pd.DataFrame,
    names: Sequence[str],
    fitting: int,
    whole: bool,
) -> TextTable:
    """Returns a version with the first runs and some of the lines."""
    left_out = [f"{len(names) - fitting} more runs"] if len(names) > fitting else []
    left_out += [f"{every - len(chosen)} more lines"] if every > len(chosen) else []
    caption = (
        "in %, MME in points, N/A is wrong; 95 % intervals for new concepts or images; * p (Holm) below "
        f"{LEVEL:g}\n{JUDGE_NOTE}" + (f"\n{listed(left_out)} are on the page" if left_out else "")
    )
    names = names[:fitting]
    printed = TextTable(caption=caption, box=SIMPLE_HEAD)
    printed.pad_edge = False
    printed.add_column("", no_wrap=True)
    for name in names:
        printed.add_column(shortened(name), justify="right")
    differ = {(row["run"], row["column"]) for row in records(differences) if row["p_holm"] < LEVEL}
    found = {(row["run"], row["column"], row["sampling_unit"]): row for row in records(long)}
    for line in chosen:
        rows = [found.get((name, line["column"], line["sampling_unit"])) for name in names]
        stars = ["*" if (name, line["column"]) in differ else " " for name in names]
        cells = ("-" if row is None else estimate_with_interval(row, whole) for row in rows)
        printed.add_row(line["heading"], *(cell + star for cell, star in zip(cells, stars, strict=True)))
    return printed


def coverage_lines(table: pd.DataFrame) -> list[str]:
    """Reports the simulated coverage of each interval method in a table, with the groups or columns that use it.

    Args:
        table: Result of :func:`safervlm.results.suite_estimates.evaluate` or of
            :func:`safervlm.results.suite_differences.compare_suites`.

    Returns:
        A sentence per sampling unit and method.
    """
    simulated = table[table["coverage"].notna() & ~table["detail"]]
    lines = []
    for (sampling_unit, method), part in simulated.groupby(["sampling_unit", "method"], sort=False):
        made = []
        for group, rows in part.groupby("group", sort=False):
            every = simulated[(simulated["group"] == group) & (simulated["sampling_unit"] == sampling_unit)]
            headings = rows["heading"].unique()
            made += [str(group)] if len(headings) == every["heading"].nunique() > 1 else [*headings]
        lines.append(f"{'; '.join(made)}: {sampling_unit} by {method}, simulated coverage {part['coverage'].iloc[0]}")
    return lines
