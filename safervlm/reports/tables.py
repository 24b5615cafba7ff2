"""The tables of scores, for the terminal, a page and a workbook."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
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
    SHOWN,
    THESE_CONCEPTS,
)
from safervlm.results.scores import ACCURACIES, by_category, compare, interval_rows
from safervlm.statistics.intervals import SKEWED, coverage

# Widths of the comparison's columns on a terminal, and what a narrow one shows of many runs.
HEADING_WIDTH, CELL_WIDTH, INTERVAL_WIDTH, UNFINISHED_WIDTH = 31, 16, 21, 22
FEW_RUNS = (24, 18, 12, 8, 5, 3)  # numbers of runs that the shorter versions show
OF_MANY, COLUMNS_OF_MANY = ("image_unsafe", "over_flagging", "modality_gap", "perception", "text_only_unsafe"), 4

NAME_WIDTH = 32  # characters of a run's name in a table on the terminal
NAMED = 3  # number of runs up to which a sentence names them

# --- the terminal -----------------------------------------------------------------------------------------------------


def comparison_tables(runs: Mapping[str, pd.DataFrame], corrected: pd.DataFrame | None = None) -> Iterator[TextTable]:
    """Yields the comparison of runs for the terminal, the most detailed version first.

    It has one column per run, which is narrower than one row per run; if the terminal is too narrow for all of them,
    one row per run with the most important measures. The later versions leave out first the intervals for these
    concepts, then diversity, then runs. Shares with N/A excluded and the published form of self-BLEU are in the files
    and on the page.

    Args:
        runs: Name -> result of :func:`safervlm.results.scores.scores`.
        corrected: Result of :func:`safervlm.reports.corrected.corrected_rates`; None if no run is labelled.
    """
    comparison = compare(runs)
    if terminal().width >= HEADING_WIDTH + CELL_WIDTH * len(runs):
        shares = [column for column in SHOWN if COLUMNS[column][1] not in DIVERSITIES]
        both = (THESE_CONCEPTS, NEW_CONCEPTS)
        for columns, units in ((SHOWN, both), (SHOWN, both[1:]), (shares, both[1:]), (OF_MANY[:3], both[1:])):
            yield _table_of_few(runs, comparison, corrected, columns, units)
    for most in (len(runs), *FEW_RUNS):
        if most <= len(runs):
            yield _table_of_many(runs, comparison, most)


def _table_of_few(
    runs: Mapping[str, pd.DataFrame],
    comparison: pd.DataFrame,
    corrected: pd.DataFrame | None,
    columns: Sequence[str],
    units: Sequence[str],
) -> TextTable:
    """One column per run: the values of the given columns of the comparison, with intervals for these units."""
    rates = [] if corrected is None else records(corrected)
    people = {(row["run"], row["rate"]): row for row in rates if not row["minus"]}
    note = "corrected: for the judge's error with people's labels, for new concepts\n" if people else ""
    excluded = BESIDE_CORRECTED if people else JUDGE_NOTE
    of = "" if THESE_CONCEPTS in units else "; more is on the page"
    caption = f"in %, N/A as wrong, with 95 % intervals{of}\n{note}{excluded}\n{GAP_WEIGHTS}"
    table = TextTable(caption=caption, box=SIMPLE_HEAD)
    table.add_column("")
    for run in comparison.index:
        table.add_column(shortened(run), justify="right")
    for column in columns:
        heading, measure, _, _ = COLUMNS[column]
        if comparison[column].isna().all():
            continue
        table.add_row(heading, *(shown(measure, value) for value in comparison[column]))
        rows = [interval_rows(of, column) for of in runs.values()]
        for sampling_unit in units:
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


def _table_of_many(runs: Mapping[str, pd.DataFrame], comparison: pd.DataFrame, most: int) -> TextTable:
    """One row for each of the first runs: its most important measures, each with its interval for new concepts."""
    left_out = f"{len(runs) - most} more runs, " if most < len(runs) else ""
    caption = (
        f"in %, N/A as wrong, with 95 % intervals for new concepts; {left_out}everything else, also corrected rates, "
        f"is on the page and in the files\n{JUDGE_NOTE}"
    )
    table = TextTable(caption=caption, box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    inside = comparison["thinking_unfinished"].any()
    beside = max(len(shortened(name)) for name in runs) + (UNFINISHED_WIDTH if inside else 0)
    room = max(1, (terminal().width - beside) // INTERVAL_WIDTH)
    shown_columns = [column for column in OF_MANY if not comparison[column].isna().all()][: min(room, COLUMNS_OF_MANY)]
    for column in shown_columns:
        table.add_column(COLUMNS[column][0], justify="right", no_wrap=True)
    if inside:
        table.add_column("thinking unfinished", justify="right")
    for (name, scores), row in itertools.islice(zip(runs.items(), records(comparison), strict=True), most):
        ends = (interval_rows(scores, column).get(NEW_CONCEPTS) for column in shown_columns)
        pairs = zip(shown_columns, ends, strict=True)
        table.add_row(
            shortened(name),
            *(percent(row[c]) if end is None else with_interval(row[c], end["low"], end["high"]) for c, end in pairs),
            *([str(row["thinking_unfinished"])] if inside else []),
        )
    return table


def bracketed(row: "pd.Series[Any]") -> str:
    """Formats the interval of a row in percent, ``[90.2, 97.0]``.

    Args:
        row: Result of :func:`safervlm.results.scores.scores`, with an interval.
    """
    return f"[{percent(row['low'])}, {percent(row['high'])}]"


def accuracy_table(table: pd.DataFrame, title: str = "Accuracy") -> TextTable:
    """Returns the accuracies of a run for the terminal, each with its interval.

    Args:
        table: Result of :func:`safervlm.results.scores.scores`.
        title: The table's title.
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
        table: Result of :func:`safervlm.results.scores.scores`.
        title: The table's title.
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
        method: Name of the method, as in a table.
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
        table: Result of :func:`safervlm.results.scores.scores`.
    """
    found: dict[str, None] = {}
    for row in records(table[table["method"] != ""]):
        part = OVERALL if row["category"] == OVERALL else "category"
        sampling_unit = f"{row['sampling_unit']}{'' if part == OVERALL else ', by category'}"
        found[f"{sampling_unit}: {with_coverage(row['method'], part)}".removeprefix(": ")] = None
    return list(found)


def listed(texts: Sequence[str]) -> str:
    """Returns texts as a list in a sentence, ``a, b and c``.

    Args:
        texts: At least one.
    """
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def shortened(name: str) -> str:
    """Returns a run's name for a table on the terminal: a long name is reduced to its beginning and end.

    Args:
        name: The name.
    """
    half = NAME_WIDTH // 2
    return name if len(name) <= NAME_WIDTH else f"{name[: half - 1]}…{name[-half:]}"


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the rows of a table as dictionaries.

    Args:
        table: Any data frame.
    """
    return cast(list[dict[str, Any]], table.to_dict("records"))


def percent(value: float) -> str:
    """Formats a share in percent with one decimal; never ``-0.0``; a dash for NaN.

    Args:
        value: The share, relative to 1.
    """
    return "-" if np.isnan(value) else f"{100 * value:.1f}".replace("-0.0", "0.0")


def signed(value: float, of_one: bool = False) -> str:
    """Formats a difference with its sign, ``+1.2``: in points with one decimal; never ``-0.0``; a dash for NaN.

    Args:
        value: The difference, relative to 1.
        of_one: Whether it is formatted relative to 1, with three decimals.
    """
    if np.isnan(value):
        return "-"
    text = f"{value:+.3f}" if of_one else f"{100 * value:+.1f}"
    return text if float(text) else text.replace("-", "+")


def shown(measure: str, value: float) -> str:
    """Formats a number for tables: in percent, self-BLEU with three decimals; a dash for NaN.

    Args:
        measure: A key of :data:`safervlm.results.measures.MEASURES`.
        value: The number, relative to 1.
    """
    if measure in DIVERSITIES and not np.isnan(value):
        return f"{value:.3f}"
    return percent(value)


def with_interval(value: float, low: float, high: float) -> str:
    """Formats a share in percent with its interval, ``94.1 [90.2, 97.0]``; without brackets if there is no interval.

    Args:
        value: The share, relative to 1.
        low: The interval's lower end; NaN if there is none.
        high: The interval's upper end.
    """
    return percent(value) if np.isnan(low) else f"{percent(value)} [{percent(low)}, {percent(high)}]"
