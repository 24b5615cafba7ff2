"""The tables of an evaluation suite, for the terminal and a page."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD

from safervlm.io.tables import EXCLUDED, JUDGE_NOTE, TextTable, terminal
from safervlm.reports.tables import records
from safervlm.results.measures import THESE_CONCEPTS
from safervlm.results.mme import ALL_TASKS
from safervlm.results.scores import unfinished_in
from safervlm.results.suite import NOT_MEASURED, Column, Evaluation
from safervlm.statistics.diversity import NO_INTERVAL, SUBSAMPLES, TEXTS, TOO_FEW
from safervlm.vlm.thinking import many_unfinished

LEVEL = 0.05
DIVERSITY_NOTE = (
    f"1 - self-BLEU: mean over {SUBSAMPLES} subsamples of {TEXTS} texts (of all, if there are fewer); the published "
    "form is of all texts."
)
HEADING_WIDTH, CELL_WIDTH = 36, 25  # characters of the terminal's table, with one decimal
OFTEN = 0.1  # share of N/A from which a remark reports it; the page reports every share

# A manifest as stage -> dotted key -> value; see safervlm.reports.runs.read_summary.
Summary = Mapping[str, Mapping[str, str]]


# --- tables -----------------------------------------------------------------------------------------------------------


def shown_estimate(unit: str, value: float, signed: bool = False, whole: Callable[[float], float] | None = None) -> str:
    """Formats a number for tables: shares and ratios in percent, MME in points, self-BLEU with three decimals.

    Args:
        unit: of :attr:`safervlm.results.suite.Column.unit`.
        value: the number; shares and ratios relative to 1. NaN becomes a dash.
        signed: whether positive numbers have a plus sign.
        whole: how shares and points are rounded to whole numbers; None: they have one decimal.
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
        row: with unit, low and high.
        signed: whether positive numbers have a plus sign.
        whole: whether the ends are rounded outwards to whole numbers.
    """
    if np.isnan(row["low"]):
        return ""
    outwards = {"low": floor, "high": ceil} if whole else {"low": None, "high": None}
    ends = (shown_estimate(row["unit"], row[end], signed, how) for end, how in outwards.items())
    return f"[{', '.join(ends)}]"


def estimate_with_interval(row: dict[str, Any], whole: bool = False) -> str:
    """Formats a number with its interval, ``94.1 [90.2, 97.0]``, and how many answers or ratings there are not.

    Args:
        row: of :func:`safervlm.results.suite.evaluate`.
        whole: whether numbers are rounded to whole ones, the interval's ends outwards.
    """
    counts = ", ".join(counts_without_answer(row))
    number = shown_estimate(row["unit"], row["value"], whole=round if whole else None)
    return " ".join(filter(None, (number, interval(row, whole=whole), f"({counts})" if counts else "")))


def counts_without_answer(row: dict[str, Any]) -> list[str]:
    """States how many responses or ratings are missing, and how many responses ended inside their reasoning.

    Args:
        row: of :func:`safervlm.results.suite.evaluate`.
    """
    counts = {"missing": row["missing"], "thinking unfinished": row["thinking_unfinished"]}
    return [f"{count} {what}" for what, count in counts.items() if count]


def lines(long: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the lines of the table, without details.

    A column has a line with its number and the interval for new concepts or new images, and, if available, a second
    line with the interval for these concepts.

    Args:
        long: of :func:`safervlm.results.suite.evaluate`, for all runs.

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
        long: of :func:`safervlm.results.suite.evaluate`, for all runs.
        names: the runs' names, in the order of the cells.

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
        long: of :func:`safervlm.results.suite.evaluate`, for all runs.
        names: the runs' names, in the order of the rows.

    Returns:
        Index ``run``; a column per line, and ``excludes``, what the intervals do not include.
    """
    return pd.DataFrame(texts(long, names), pd.Index(names, name="run")).assign(excludes=EXCLUDED)


def evaluation_table(long: pd.DataFrame, differences: pd.DataFrame, names: Sequence[str]) -> TextTable:
    """Returns the table for the terminal, with one column per run: one line per column, without self-BLEU and details.

    On a narrow terminal numbers are rounded to whole ones, intervals outwards.

    Args:
        long: of :func:`safervlm.results.suite.evaluate`, for all runs.
        differences: of :func:`safervlm.results.suite_differences.compare_suites`; may be empty.
        names: the runs' names, in the order of the columns; the first is the original.
    """
    caption = (
        "in %, MME in points, N/A is wrong; 95 % intervals for new concepts or images; * p (Holm) below "
        f"{LEVEL:g}\n{JUDGE_NOTE}"
    )
    printed = TextTable(caption=caption, box=SIMPLE_HEAD)
    printed.pad_edge = False
    printed.add_column("", no_wrap=True)
    for name in names:
        printed.add_column(name, justify="right")
    whole = terminal().width < HEADING_WIDTH + CELL_WIDTH * len(names)
    differ = {(row["run"], row["column"]) for row in records(differences) if row["p_holm"] < LEVEL}
    found = {(row["run"], row["column"], row["sampling_unit"]): row for row in records(long)}
    for line in lines(long):
        if not line["first"] or line["unit"] == "":
            continue
        rows = [found.get((name, line["column"], line["sampling_unit"])) for name in names]
        stars = ["*" if (name, line["column"]) in differ else " " for name in names]
        cells = ("-" if row is None else estimate_with_interval(row, whole) for row in rows)
        printed.add_row(line["heading"], *(cell + star for cell, star in zip(cells, stars, strict=True)))
    return printed


def remarks(
    long: pd.DataFrame,
    differences: pd.DataFrame,
    evaluations: Sequence[Evaluation],
    wanted: Sequence[Column],
    manifests: Sequence[tuple[str, Summary]],
) -> list[str]:
    """Lists remarks that are needed to interpret the numbers.

    They state unfinished evaluations, missing responses, the share of N/A, unfinished thinking, unexpected
    reasons why an interval or a difference is missing, and runs of other base models.

    Args:
        long: of :func:`safervlm.results.suite.evaluate`, for all runs.
        differences: of :func:`safervlm.results.suite_differences.compare_suites`; may be empty.
        evaluations: the runs.
        wanted: the columns.
        manifests: name and manifest of each run.

    Returns:
        A sentence each.
    """
    said = [
        f"{name}: the evaluation isn't finished; the same command resumes"
        for name, summary in manifests
        if summary.get("measure", {}).get("finished", "true").lower() == "false"
    ]
    table = long[~long["detail"]].drop_duplicates(["run", "column"])
    # Only columns over a whole dataset: the share of N/A is similar in its parts.
    shares = {c.key for c in wanted if not c.side and (c.measure == "share" or len(c.tasks) == len(ALL_TASKS))}
    for each in evaluations:
        mine = table[table["run"] == each.name]
        for row in records(mine[mine["missing"] > 0]):
            rated = row["column"] in set(each.ratings["dataset"])
            effect = "they count as wrong" if row["unit"] == "points" else "they are excluded"
            way_out = "; add a judge to the same command: --config configs/rate.yaml" if rated else ""
            what = "ratings" if rated else "responses"
            said.append(f"{each.name}: {row['missing']} {what} of {row['heading']} are missing: {effect}{way_out}")
        often = mine[mine["column"].isin(shares) & (mine["na_rate"] >= OFTEN)]
        if len(often):
            parts = [f"{100 * row['na_rate']:.0f} % of {row['heading']}" for row in records(often)]
            said.append(f"{each.name}: N/A, which counts as wrong, is {'; '.join(parts)}")
        every = pd.concat([each.answers, each.unfinished])
        if line := many_unfinished(each.name, unfinished_in(every), len(every)):
            said.append(line)
    plain = table["method"].str.startswith(NO_INTERVAL) | (table["method"] == NOT_MEASURED)
    bare = table[table["method"].str.startswith("none: ") & ~plain]
    for (run, method), part in bare.groupby(["run", "method"], sort=False):
        said.append(f"{run}: no interval, {str(method).removeprefix('none: ')}: {'; '.join(part['heading'])}")
    said += other_models(manifests)
    if len(differences):
        excluded = differences[differences["difference"].isna() & ~differences["detail"]]
        said += [
            f"{run}: no difference, {str(method).removeprefix('none: ')}: {'; '.join(part['heading'])}"
            for (run, method), part in excluded.groupby(["run", "method"], sort=False)
        ]
    return said


def few_texts(long: pd.DataFrame) -> list[str]:
    """Lists the runs whose diversity is of too few texts to be compared, in a sentence each.

    Args:
        long: of :func:`safervlm.results.suite.evaluate`, for all runs.
    """
    few = long[~long["detail"] & (long["method"] == TOO_FEW)]
    return [
        f"{run}: of fewer than {TEXTS} texts, more would lower it: "
        + "; ".join(f"{row['heading']} ({row['n']} texts)" for row in records(rows))
        for run, rows in few.groupby("run", sort=False)
    ]


def other_models(manifests: Sequence[tuple[str, Summary]]) -> list[str]:
    """Returns a sentence on each run whose base model differs from the first one's.

    Args:
        manifests: name and manifest of each run; at least one.
    """

    def base(summary: Summary) -> tuple[str | None, ...]:
        measured = summary.get("measure", {})
        name, weights = measured.get("settings.model.vlm.model"), measured.get("settings.model.vlm.weights")
        # Without known weights, as with a server, compare the model's name and revision.
        return (weights,) if weights not in (None, "", "None") else (name, measured.get("settings.model.vlm.revision"))

    (first, original), *others = manifests
    return [
        f"{name} and {first} have other base models ({_model(summary)}; {_model(original)}): not all of their "
        "difference is due to an adapter"
        for name, summary in others
        if base(summary) != base(original)
    ]


def _model(summary: Summary) -> str:
    return summary.get("measure", {}).get("settings.model.vlm.model", "unknown")


def coverage_lines(table: pd.DataFrame) -> list[str]:
    """Reports the simulated coverage of each interval method in a table, with the groups or columns that use it.

    Args:
        table: of :func:`safervlm.results.suite.evaluate` or :func:`safervlm.results.suite_differences.compare_suites`.

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
