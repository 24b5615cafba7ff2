"""The tables of scores, for the terminal, a page and a workbook."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD

from safervlm.io.tables import BESIDE_CORRECTED, JUDGE_NOTE, TextTable, terminal
from safervlm.results.measures import (
    COLUMNS,
    DIVERSITIES,
    GAP_WEIGHTS,
    MEASURES,
    MODALITY_GAP,
    NEW_CONCEPTS,
    OVERALL,
    THESE_CONCEPTS,
)
from safervlm.results.scores import ACCURACIES, by_category, compare, interval_rows
from safervlm.statistics.intervals import SKEWED, coverage

# Widths of the comparison's columns on a terminal, and what a narrow one shows of many runs.
HEADING_WIDTH, CELL_WIDTH = 31, 16
OF_MANY, COLUMNS_OF_MANY = ("image_unsafe", "over_flagging", "modality_gap", "perception", "text_only_unsafe"), 4

# --- the terminal -----------------------------------------------------------------------------------------------------


def comparison_table(runs: Mapping[str, pd.DataFrame], corrected: pd.DataFrame | None = None) -> TextTable:
    """Returns the comparison of runs for the terminal.

    It has one column per run, which is narrower than one row per run; if the terminal is too narrow for all of them,
    one row per run with the most important measures. Shares with N/A excluded and the published form of self-BLEU are
    in the files and on the page.

    Args:
        runs: name -> table of :func:`safervlm.results.scores.scores`.
        corrected: of :func:`safervlm.reports.corrected.corrected_rates`; None if no run is labelled.
    """
    comparison = compare(runs)
    if terminal().width < HEADING_WIDTH + CELL_WIDTH * len(runs):
        return _table_of_many(runs, comparison)
    rates = [] if corrected is None else records(corrected)
    people = {(row["run"], row["rate"]): row for row in rates if not row["minus"]}
    note = "corrected: for the judge's error with people's labels, for new concepts\n" if people else ""
    excluded = BESIDE_CORRECTED if people else JUDGE_NOTE
    caption = f"in %, N/A as wrong, with 95 % intervals\n{note}{excluded}\n{GAP_WEIGHTS}"
    table = TextTable(caption=caption, box=SIMPLE_HEAD)
    table.add_column("")
    for run in comparison.index:
        table.add_column(run, justify="right")
    for column, (heading, measure, _, _) in COLUMNS.items():
        if column.endswith(("_na_left_out", "_published")) or comparison[column].isna().all():
            continue
        table.add_row(heading, *(shown(measure, value) for value in comparison[column]))
        rows = [interval_rows(of, column) for of in runs.values()]
        for sampling_unit in (THESE_CONCEPTS, NEW_CONCEPTS):
            if any(sampling_unit in each for each in rows):
                cells = (bracketed(each[sampling_unit]) if sampling_unit in each else "-" for each in rows)
                table.add_row(f"  {sampling_unit}", *cells, style="dim")
        found = [people.get((run, column)) for run in comparison.index]
        if any(found):
            ends = (row and with_interval(row["corrected"], row["low_new"], row["high_new"]) for row in found)
            table.add_row("  corrected", *(cell or "-" for cell in ends))
    table.add_row("N/A, share of all responses", *map(percent, comparison["na_rate"]))
    if comparison["thinking_unfinished"].any():
        table.add_row("thinking unfinished", *map(str, comparison["thinking_unfinished"]))
    table.add_row("responses", *map(str, comparison["n"]))
    return table


def _table_of_many(runs: Mapping[str, pd.DataFrame], comparison: pd.DataFrame) -> TextTable:
    """One row per run: its most important measures, each with its interval for new concepts."""
    caption = (
        "in %, N/A as wrong, with 95 % intervals for new concepts; everything else, also corrected rates, is on "
        f"the page and in the files\n{JUDGE_NOTE}"
    )
    table = TextTable(caption=caption, box=SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    shown_columns = [column for column in OF_MANY if not comparison[column].isna().all()][:COLUMNS_OF_MANY]
    for column in shown_columns:
        table.add_column(COLUMNS[column][0], justify="right", no_wrap=True)
    for (name, scores), row in zip(runs.items(), records(comparison), strict=True):
        ends = (interval_rows(scores, column).get(NEW_CONCEPTS) for column in shown_columns)
        pairs = zip(shown_columns, ends, strict=True)
        table.add_row(
            name,
            *(percent(row[c]) if end is None else with_interval(row[c], end["low"], end["high"]) for c, end in pairs),
        )
    return table


def bracketed(row: "pd.Series[Any]") -> str:
    """Formats the interval of a row in percent, ``[90.2, 97.0]``.

    Args:
        row: of :func:`safervlm.results.scores.scores`, with an interval.
    """
    return f"[{percent(row['low'])}, {percent(row['high'])}]"


def accuracy_table(table: pd.DataFrame, title: str = "Accuracy") -> TextTable:
    """Returns the accuracies of a run for the terminal, each with its interval.

    Args:
        table: of :func:`safervlm.results.scores.scores`.
        title: the table's title.
    """
    rows = records(by_category(table))
    caption = "\n".join(["95 % intervals", *methods(table), JUDGE_NOTE])
    printed = TextTable(title=title, caption=caption, box=SIMPLE_HEAD)
    printed.add_column("category")
    inside = any(row["thinking_unfinished"] for row in rows)
    for heading in ("n", "N/A", *(["thinking unfinished"] if inside else []), "N/A as wrong", "N/A excluded"):
        printed.add_column(heading, justify="right")
    part = None
    for row in rows:
        if part != (row["capability"], row["side"]):
            part = (row["capability"], row["side"])
            printed.add_section()
            printed.add_row(row["capability"] + (f", {row['side']}" if row["side"] != "-" else ""), style="bold")
        wrong = with_interval(row["accuracy_na_wrong"], row["low_na_wrong"], row["high_na_wrong"])
        left_out = with_interval(row["accuracy"], row["low"], row["high"])
        whole = row["category"] == OVERALL
        name = f"{OVERALL}, {row['sampling_unit']}" if whole and row["sampling_unit"] else row["category"]
        counted = [str(row["n"]), percent(row["na_rate"]), *([str(row["thinking_unfinished"])] if inside else [])]
        printed.add_row(f"  {name}", *counted, wrong, left_out, style="bold" if whole else None)
    return printed


def other_table(table: pd.DataFrame, title: str = "Gap, over-flagging, diversity") -> TextTable:
    """Returns the overall measures of a run other than accuracies, for the terminal.

    Args:
        table: of :func:`safervlm.results.scores.scores`.
        title: the table's title.
    """
    rows = records(table[~table["measure"].isin(ACCURACIES) & (table["category"] == OVERALL)])
    about = [", ".join(filter(None, (MEASURES[row["measure"]], row["sampling_unit"]))) for row in rows]
    made = {f"{name}: {with_coverage(row['method'])}": None for name, row in zip(about, rows, strict=True)}
    said = [GAP_WEIGHTS] if any(row["measure"] == MODALITY_GAP for row in rows) else []
    caption = "\n".join(["95 % intervals", *made, JUDGE_NOTE, *said])
    printed = TextTable(title=title, caption=caption, box=SIMPLE_HEAD)
    for heading in ("measure", "of"):
        printed.add_column(heading)
    inside = any(row["thinking_unfinished"] for row in rows)
    for heading in ("n", *(["thinking unfinished"] if inside else []), "value"):
        printed.add_column(heading, justify="right")
    printed.add_column("sampling unit")
    for row in rows:
        value = shown(row["measure"], row["value"])
        if not np.isnan(row["low"]):
            value = with_interval(row["value"], row["low"], row["high"])
        of = row["capability"] + (f", {row['side']}" if row["side"] != "-" else "")
        counted = [str(row["n"]), *([str(row["thinking_unfinished"])] if inside else [])]
        printed.add_row(MEASURES[row["measure"]], of, *counted, value, row["sampling_unit"])
    return printed


def with_coverage(method: str, part: str = OVERALL) -> str:
    """Returns a method's name with the simulated coverage of its intervals, if known.

    Args:
        method: name of the method, as in a table.
        part: ``overall`` or ``category``; if this was not simulated for the method, the range over all simulations is
            used.
    """
    held, skewed = coverage(method, part) or coverage(method), coverage(method, SKEWED)
    if held is None:
        return method
    return f"{method}; simulated coverage {held}" + (f", {skewed} if few concepts make the errors" if skewed else "")


def methods(table: pd.DataFrame) -> list[str]:
    """Lists the interval methods of a table with their simulated coverage, one line per sampling unit and method.

    Args:
        table: of :func:`safervlm.results.scores.scores`.
    """
    found: dict[str, None] = {}
    for row in records(table[table["method"] != ""]):
        part = OVERALL if row["category"] == OVERALL else "category"
        sampling_unit = f"{row['sampling_unit']}{'' if part == OVERALL else ', by category'}"
        found[f"{sampling_unit}: {with_coverage(row['method'], part)}".removeprefix(": ")] = None
    return list(found)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the rows of a table as dictionaries.

    Args:
        table: any data frame.
    """
    return cast(list[dict[str, Any]], table.to_dict("records"))


def percent(value: float) -> str:
    """Formats a share in percent with one decimal; a dash for NaN.

    Args:
        value: the share, relative to 1.
    """
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def signed(value: float, of_one: bool = False) -> str:
    """Formats a difference with its sign, ``+1.2``: in points with one decimal; never ``-0.0``.

    Args:
        value: the difference, relative to 1.
        of_one: whether it is formatted relative to 1, with three decimals.
    """
    text = f"{value:+.3f}" if of_one else f"{100 * value:+.1f}"
    return text if float(text) else text.replace("-", "+")


def shown(measure: str, value: float) -> str:
    """Formats a number for tables: in percent, self-BLEU with three decimals; a dash for NaN.

    Args:
        measure: a key of :data:`safervlm.results.measures.MEASURES`.
        value: the number, relative to 1.
    """
    if measure in DIVERSITIES and not np.isnan(value):
        return f"{value:.3f}"
    return percent(value)


def with_interval(value: float, low: float, high: float) -> str:
    """Formats a share in percent with its interval, ``94.1 [90.2, 97.0]``; without brackets if there is no interval.

    Args:
        value: the share, relative to 1.
        low: the interval's lower end; NaN if there is none.
        high: the interval's upper end.
    """
    return percent(value) if np.isnan(low) else f"{percent(value)} [{percent(low)}, {percent(high)}]"
