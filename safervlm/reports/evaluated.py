"""The evaluations of a report: loaded, compared, and as sections of its page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from safervlm.errors import RecordError
from safervlm.reports.runs import read_summary
from safervlm.reports.suite_remarks import suite_remarks, suite_warnings
from safervlm.reports.suite_tables import (
    ALIGNMENT,
    GENERAL,
    LEVEL,
    Summary,
    coverage_lines,
    interval,
    shown_estimate,
)
from safervlm.reports.tables import records
from safervlm.results.measures import UnfinishedAs
from safervlm.results.suite import Evaluation, load_suite
from safervlm.results.suite_columns import Column, columns
from safervlm.results.suite_differences import compare_suites
from safervlm.results.suite_estimates import estimates, evaluate
from safervlm.run import reject_active_run
from safervlm.run_folder import RunFolder

NOTE = (
    "A difference that is not significant does not show that nothing was lost. The bound is the lower end of a 95 % "
    "interval, without a correction for the number of bounds."
)
# Sections of a page: title -> (groups of columns, how many of them are open). With measurements, which report alignment
# in more detail, only general ability is open.
ALONE: dict[str, tuple[tuple[str, ...], int]] = {
    "Alignment": (ALIGNMENT, 1),
    GENERAL: ((GENERAL,), 1),
    "Contexts of use": (("Contexts of use",), 1),
    "Generalisation": (("Generalisation",), 1),
}
BESIDE_MEASUREMENTS: dict[str, tuple[tuple[str, ...], int]] = {
    GENERAL: ((GENERAL,), 1),
    "Other evaluated questions": ((*ALIGNMENT, "Contexts of use", "Generalisation"), 0),
}


@dataclass(frozen=True)
class Evaluations:
    """Evaluations with their scores.

    Attributes:
        evaluations: The models that could be read.
        original: The first one, if it could be read.
        wanted: The columns of their tables.
        long: Result of :func:`safervlm.results.suite_estimates.evaluate`, for all models.
        differences: Result of :func:`safervlm.results.suite_differences.compare_suites`, for all models but the
            original; may be empty.
        unread: A sentence on each model that is excluded.
        notices: Messages about the other models from when they were loaded.
        manifests: Name and manifest of each model.
    """

    evaluations: list[Evaluation]
    original: Evaluation | None
    wanted: list[Column]
    long: pd.DataFrame
    differences: pd.DataFrame
    unread: list[str]
    notices: list[str]
    manifests: list[tuple[str, Summary]]

    @property
    def names(self) -> list[str]:
        """The models' names."""
        return [each.name for each in self.evaluations]

    @property
    def warnings(self) -> list[str]:
        """What may make the numbers wrong, the most important first."""
        return [*self.unread, *suite_warnings(self.long, self.evaluations, self.manifests)]

    @property
    def remarks(self) -> list[str]:
        """Further remarks on the numbers."""
        return [*self.notices, *suite_remarks(self.long, self.differences, self.evaluations, self.wanted)]

    @property
    def methods(self) -> list[str]:
        """The simulated coverage of each interval method."""
        return coverage_lines(self.long) + (coverage_lines(self.differences) if len(self.differences) else [])


def compare_evaluations(paths: Sequence[Path], names: Sequence[str], unfinished: UnfinishedAs = "apart") -> Evaluations:
    """Loads, scores and compares evaluations.

    Args:
        paths: The run folders; the first is the original.
        names: The runs' names, in the same order.
        unfinished: See :func:`safervlm.results.runs.load_run`.

    Raises:
        RecordError: No evaluation can be read, or nothing was evaluated.
    """
    notices: list[str] = []
    loaded, unread = read_suites(paths, names, unfinished, notices.append)
    original = loaded[0] if loaded[0].name == names[0] else None
    wanted = columns(loaded)
    if not wanted:
        raise RecordError(f"{paths[0]}: nothing was evaluated; safervlm evaluate {paths[0]}")
    long = pd.concat([evaluate(each, wanted) for each in loaded], ignore_index=True)
    tables = [compare_suites(each, original, wanted) for each in loaded[1:]] if original else []
    differences = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    manifests: list[tuple[str, Summary]] = [
        (each.name, read_summary(RunFolder(each.folder).manifest)) for each in loaded
    ]
    return Evaluations(loaded, original, wanted, long, differences, unread, notices, manifests)


def read_suites(
    paths: Sequence[Path], names: Sequence[str], unfinished: UnfinishedAs, tell: Callable[[str], None]
) -> tuple[list[Evaluation], list[str]]:
    """Loads the evaluations that can be read, and reports those that can't.

    Args:
        paths: The run folders.
        names: The runs' names, in the same order; the first is the original.
        unfinished: See :func:`safervlm.results.runs.load_run`.
        tell: Receives each message on a run.

    Returns:
        The evaluations, and a sentence on each run that is excluded.

    Raises:
        RecordError: None can be read.
    """
    loaded: list[Evaluation] = []
    unread = []
    for path, name in zip(paths, names, strict=True):
        try:
            folder = folder_of(path)
            reject_active_run(folder)
            each = load_suite(folder, name, unfinished, tell)
            for column in columns([each]):
                if column.measure == "mme":
                    estimates(each, column)  # raises for a dataset that MME's rule can't score
            loaded.append(each)
        except RecordError as error:
            if len(paths) == 1:
                raise
            lost = ", and there are no differences from it" if name == names[0] else ""
            unread.append(f"{name} is skipped{lost}: {error}")
    if not loaded:
        raise RecordError("; ".join(unread))
    return loaded, unread


def folder_of(run: Path) -> Path:
    """Returns the folder of a run's evaluation: its subfolder ``evaluation`` if there is one, else the folder itself.

    Args:
        run: The run folder.

    Raises:
        RecordError: It contains no evaluation.
    """
    files = RunFolder(run)
    folder = files.evaluation if files.evaluation.is_dir() else run
    responses = RunFolder(folder).responses
    if not responses.is_file():
        raise RecordError(f"{responses}: no such file; evaluate the run: safervlm evaluate {run}")
    return folder


def evaluated_sections(compared: Evaluations, beside_measurements: bool = False) -> dict[str, Any]:
    """Prepares the sections for the template.

    Args:
        compared: The evaluations.
        beside_measurements: Whether the page reports measurements, too.
    """
    long = compared.long
    intervals = {
        key: rows.to_dict("records") for key, rows in long[long["low"].notna()].groupby(["run", "column"], sort=False)
    }
    headings = records(long[["group", "column", "heading", "unit", "detail"]].drop_duplicates("column"))
    details = [column for column in headings if column["detail"]]
    groups = []
    for title, (members, unfolded) in (BESIDE_MEASUREMENTS if beside_measurements else ALONE).items():
        parts = [(each, [c for c in headings if c["group"] == each and not c["detail"]]) for each in members]
        tables = [
            {"title": each, "columns": shown, "folded": number >= unfolded}
            for number, (each, shown) in enumerate(part for part in parts if part[1])
        ]
        if title == GENERAL and details:
            tables.append({"title": "MME: accuracies and tasks", "columns": details, "folded": True})
        if tables:
            groups.append({"title": title, "note": NOTE if title == GENERAL else "", "parts": tables})
    return {
        "groups": groups,
        "names": compared.names,
        "cells": {(row["run"], row["column"]): row for row in records(long)},
        "intervals": intervals,
        "compared": {(row["run"], row["column"]): row for row in records(compared.differences)},
        "bounds": loss_bounds(compared.differences, compared.wanted),
        "na_counts": {column.key for column in compared.wanted if column.measure in ("share", "mme", "both")},
        "shown": shown_estimate,
        "interval": interval,
        "level": LEVEL,
    }


def loss_bounds(differences: pd.DataFrame, wanted: Sequence[Column]) -> Mapping[tuple[str, str], str]:
    """States how much may be lost, with 95 % confidence, of general ability and of accuracy on safe images.

    Args:
        differences: Result of :func:`safervlm.results.suite_differences.compare_suites`; may be empty.
        wanted: The columns.

    Returns:
        Run and column -> the bound, for those that have an interval.
    """
    watched = {c.key for c in wanted if c.group == GENERAL or (c.side == "safe" and c.measure == "share")}
    return {
        (row["run"], row["column"]): f"at most {shown_estimate(row['unit'], max(-row['low'], 0.0))} points lost"
        for row in records(differences)
        if row["column"] in watched and not row["detail"] and not np.isnan(row["low"])
    }
