"""The results that a report states first: a few measures of every run, each with its difference from the first run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from safervlm.reports.runs import Run
from safervlm.reports.tables import records
from safervlm.results.common import difference_from
from safervlm.results.measures import COLUMNS, MODALITY_GAP, NEW_CONCEPTS, THESE_CONCEPTS
from safervlm.results.scores import interval_rows, overall
from safervlm.results.suite_columns import CONTEXTS, GENERAL, GENERALISATION

UNSAFE, SAFE, OVER_FLAGGED, BY_NAME, PERCEPTION, GAP = (
    "image_unsafe",
    "image_safe",
    "over_flagging",
    "text_only_unsafe",
    "perception",
    "modality_gap",
)
# Key -> title, and a description of its numbers.
CORRECT, LESS = "% correct", "less is better"
TITLES = {
    UNSAFE: ("Unsafe images", CORRECT),
    SAFE: ("Safe images", CORRECT),
    OVER_FLAGGED: ("Over-flagging", f"%, {LESS}"),
    GAP: ("Modality gap", "points, 0 is best"),
    BY_NAME: ("Unsafe concepts by name", CORRECT),
    PERCEPTION: ("Perception", CORRECT),
}
MEASURED = (UNSAFE, OVER_FLAGGED, GAP, PERCEPTION, BY_NAME)  # of a measurement, the most important first
# Columns of an evaluation: key -> possible columns, of which the first existing one is used.
EVALUATED = {UNSAFE: ("alignment_unsafe", "alignment_unsafe_drawn"), SAFE: ("alignment_safe", "alignment_safe_drawn")}
OTHER_GROUPS = (CONTEXTS, GENERAL, GENERALISATION)
THIS_RUN = "these responses"
NEW_SEEDS = "new concepts and new training seeds"


@dataclass(frozen=True, slots=True)
class Number:
    """A share, or a difference of shares, with its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval; NaN if there is none.
        high: Upper end of the interval; NaN if there is none.
    """

    value: float
    low: float = np.nan
    high: float = np.nan


@dataclass(frozen=True, slots=True)
class Outcome:
    """A measure of one run.

    Attributes:
        run: The run's name.
        number: The value; None if it was not measured.
        difference: The value minus that of the first run; None for the first run, and if the two are not comparable.
        only_na: Whether every response is N/A.
        judged: The value as judged, if ``number`` is corrected for the judge's error; else NaN.
        group: Name of the group of training seeds that ``run`` stands for; empty for a single run.
    """

    run: str
    number: Number | None
    difference: Number | None = None
    only_na: bool = False
    judged: float = np.nan
    group: str = field(default="", kw_only=True)


@dataclass(frozen=True, slots=True)
class Result:
    """A measure of all runs.

    Attributes:
        key: A key of :data:`TITLES`, or the name of an evaluation's column.
        title: Its name on a page.
        unit: Description of its numbers.
        outcomes: One per run, in their order; the first run is the baseline.
        sampling_unit: Sampling unit of the intervals of the values; empty if there are none.
        corrected: Whether numbers and intervals are corrected for the judge's error.
    """

    key: str
    title: str
    unit: str
    outcomes: tuple[Outcome, ...]
    sampling_unit: str = NEW_CONCEPTS
    corrected: bool = field(default=False, kw_only=True)

    @property
    def measured(self) -> tuple[Outcome, ...]:
        """The outcomes of the runs in which it was measured."""
        return tuple(each for each in self.outcomes if each.number is not None)


# --- of measurements --------------------------------------------------------------------------------------------------


def measured_findings(runs: Sequence[Run], corrected: pd.DataFrame) -> list[Result]:
    """Returns the findings of measurements, the most important first.

    The numbers of a measure are corrected for the judge's error if all runs that have it are labelled.

    Args:
        runs: The runs; the first is the baseline.
        corrected: Result of :func:`safervlm.reports.corrected.corrected_rates`.
    """
    found = []
    for column in MEASURED:
        judged = _as_judged(runs, column)
        if judged is not None:
            found.append(_as_corrected(judged, corrected) or judged)
    return found


def _as_judged(runs: Sequence[Run], column: str) -> Result | None:
    rows = [interval_rows(run.scores, column) for run in runs]
    measured = [overall(run.scores, column) is not None for run in runs]
    units = [
        unit
        for unit in (NEW_CONCEPTS, THESE_CONCEPTS)
        if all(unit in each for each, there in zip(rows, measured, strict=True) if there)
    ]
    if not any(measured):
        return None
    unit = units[0] if units else ""
    outcomes = []
    for run in runs:
        row = overall(run.scores, column, unit or NEW_CONCEPTS)
        if row is None or np.isnan(row["value"]):
            outcomes.append(Outcome(run.name, None))
            continue
        change = None
        if run is not runs[0] and COLUMNS[column][1] != MODALITY_GAP:
            estimate = difference_from(run.frame, runs[0].frame, column)
            change = None if np.isnan(estimate.value) else Number(estimate.value, estimate.low, estimate.high)
        number = Number(row["value"], row["low"], row["high"])
        outcomes.append(Outcome(run.name, number, change, only_na=row["na_rate"] == 1))
    return Result(column, *TITLES[column], tuple(outcomes), unit)


def _as_corrected(judged: Result, corrected: pd.DataFrame) -> Result | None:
    """Replaces the numbers of a finding by corrected ones; None unless all its runs have one."""
    rows = {(row["run"], row["minus"]): row for row in records(corrected) if row["rate"] == judged.key}
    runs = [each.run for each in judged.measured]
    if not all((run, "") in rows for run in runs):
        return None
    new = not any(np.isnan(rows[run, ""]["low_new"]) for run in runs)

    def number(row: Mapping[str, Any] | None) -> Number | None:
        ends = "new" if new else "run"
        return None if row is None else Number(row["corrected"], row[f"low_{ends}"], row[f"high_{ends}"])

    first = judged.outcomes[0].run
    outcomes = [
        Outcome(
            each.run,
            number(rows.get((each.run, ""))),
            number(rows.get((each.run, first))),
            each.only_na,
            each.number.value if each.number else np.nan,
        )
        for each in judged.outcomes
    ]
    return Result(
        judged.key, judged.title, judged.unit, tuple(outcomes), NEW_CONCEPTS if new else THIS_RUN, corrected=True
    )


def group_findings(base: Run | None, groups: pd.DataFrame, differences: pd.DataFrame) -> list[Result]:
    """Returns the findings of groups of runs that differ in their training seed only, in the place of those runs.

    Args:
        base: The run that the groups are compared with; None if it is the first group.
        groups: Result of :func:`safervlm.results.groups.group_table`.
        differences: Result of :func:`safervlm.results.groups.group_differences`; may be empty.
    """
    found = []
    changes = {(row["group"], row["measure"]): row for row in records(differences)}
    for measure in [column for column in MEASURED if column in set(groups["measure"])]:
        outcomes: list[Outcome] = []
        unit = NEW_SEEDS
        if base is not None:
            alone = _as_judged([base], measure)
            outcomes += alone.outcomes if alone else [Outcome(base.name, None)]
            # A single run is treated as fixed, whether it was trained or not.
            unit += f" ({base.name}: {alone.sampling_unit})" if alone and alone.sampling_unit else ""
        for row in records(groups[groups["measure"] == measure]):
            change = changes.get((row["group"], measure))
            outcomes.append(
                Outcome(
                    f"{row['group']} over {row['seeds']} {'seed' if row['seeds'] == 1 else 'seeds'}",
                    Number(row["value"], row["low"], row["high"]),
                    Number(change["value"], change["low"], change["high"]) if change else None,
                    group=row["group"],
                )
            )
        found.append(Result(measure, *TITLES[measure], tuple(outcomes), unit))
    return found


# --- of evaluations ---------------------------------------------------------------------------------------------------


def evaluated_findings(names: Sequence[str], long: pd.DataFrame, differences: pd.DataFrame) -> list[Result]:
    """Returns the findings of evaluations: the two sides of alignment, then the other columns in percent.

    Args:
        names: The runs' names; the first is the original.
        long: Result of :func:`safervlm.results.suite_estimates.evaluate`, for all runs.
        differences: Result of :func:`safervlm.results.suite_differences.compare_suites`; may be empty.
    """
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in records(long):  # the last row of a column that has an interval is the one for new concepts or images
        if (row["run"], row["column"]) not in cells or not np.isnan(row["low"]):
            cells[row["run"], row["column"]] = row
    changes = {(row["run"], row["column"]): row for row in records(differences)}
    found = []
    for key, title, unit, column in _columns(long):
        outcomes = []
        for name in names:
            cell, change = cells.get((name, column)), changes.get((name, column))
            number = None
            if cell is not None and not np.isnan(cell["value"]):
                number = Number(cell["value"], cell["low"], cell["high"])
            difference = None
            if change is not None and not np.isnan(change["difference"]):
                difference = Number(change["difference"], change["low"], change["high"])
            outcomes.append(Outcome(name, number, difference, only_na=cell is not None and cell["na_rate"] == 1))
        of = next((cells[name, column]["sampling_unit"] for name in names if (name, column) in cells), "")
        found.append(Result(key, title, unit, tuple(outcomes), of))
    return found


def _columns(long: pd.DataFrame) -> Iterator[tuple[str, str, str, str]]:
    """Yields key, title, unit and column of an evaluation's findings."""
    rows = long[~long["detail"] & (long["unit"] == "%")].drop_duplicates("column")
    there = set(rows["column"])
    for key, choice in EVALUATED.items():
        for column in [name for name in choice if name in there][:1]:
            yield key, *TITLES[key], column
    for group in OTHER_GROUPS:
        for row in records(rows[rows["group"] == group]):
            yield row["column"], row["heading"], "%", row["column"]
