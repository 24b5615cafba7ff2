"""Content of a report: the measurements or evaluations with everything that is derived from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from safervlm.reports.comparable import few_texts, of_groups, warnings
from safervlm.reports.evaluated import Evaluations
from safervlm.reports.extra import ExtraTable
from safervlm.reports.findings import Result, evaluated_findings, group_findings, measured_findings
from safervlm.reports.headline import headline, headline_note, in_no_group
from safervlm.reports.runs import Run


@dataclass(frozen=True)
class Contents:
    """Content of a report.

    Attributes:
        command: Name of the command.
        runs: Measurements; the first is the baseline. Empty for evaluations alone.
        corrected: Result of :func:`safervlm.reports.corrected.corrected_rates`, for the measurements.
        evaluated: Evaluations; None for measurements alone.
        extra: Further tables that the runs allow.
        curve: The plot of the operating curves; None without log-odds.
        calibration: The plot of the judge's calibration; None without labels of people.
        rejected: What could not be used, in a sentence each: labels, log-odds, evaluations.
        groups: Groups of training seeds: name -> names of their runs.
        results: Further results in a sentence each: of the operating curves.
        notices: Messages about the runs from when they were loaded.
    """

    command: str
    runs: Sequence[Run] = ()
    corrected: pd.DataFrame = field(default_factory=pd.DataFrame)
    evaluated: Evaluations | None = None
    extra: Sequence[ExtraTable] = ()
    curve: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    rejected: Sequence[str] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict, kw_only=True)
    results: Sequence[str] = ()
    notices: Sequence[str] = ()

    @cached_property
    def differences(self) -> pd.DataFrame:
        """The differences of the evaluations; may be empty."""
        return pd.DataFrame() if self.evaluated is None else self.evaluated.differences

    @cached_property
    def findings(self) -> list[Result]:
        """The measures of every run; of those that a measurement and an evaluation have, that of the measurements."""
        found = measured_findings(self.runs, self.corrected) if self.runs else []
        if self.evaluated is not None:
            there = evaluated_findings(self.evaluated.names, self.evaluated.long, self.evaluated.differences)
            names = [run.name for run in self.runs] or self.evaluated.names
            if names == self.evaluated.names:
                found += [each for each in there if not self.runs or each.key not in ("image_unsafe", "image_safe")]
        return found

    @cached_property
    def stated(self) -> list[Result]:
        """What the first screen shows: with groups of training seeds, the groups instead of their runs."""
        tables = {table.name: table.numbers for table in self.extra}
        groups = tables.get("groups", pd.DataFrame())
        if groups.empty:
            return self.findings
        base = None if self.runs[0].name in self._grouped else self.runs[0]
        return group_findings(base, groups, tables.get("group_differences", pd.DataFrame()))

    @property
    def _grouped(self) -> set[str]:
        return {run for runs in self.groups.values() for run in runs}

    @cached_property
    def headline(self) -> list[str]:
        """The sentences at the top, the last of which states what the intervals are about."""
        stated = self.stated
        apart = [run.name for run in self.runs[1:] if run.name not in self._grouped] if self.groups else []
        note = f"{headline_note(stated)} {in_no_group(apart)}" if apart else headline_note(stated)
        return [*headline(stated), note]

    @cached_property
    def warnings(self) -> list[str]:
        """What may make the headline wrong, the most important first, without repetitions."""
        of_runs = warnings(self.runs) if self.runs else []
        by_name = {run.name: run for run in self.runs}
        grouped = of_groups({name: [by_name[run] for run in runs] for name, runs in self.groups.items()})
        of_evaluations = self.evaluated.warnings if self.evaluated else []
        return [*dict.fromkeys([*grouped, *of_runs, *self.rejected, *of_evaluations])]

    @cached_property
    def remarks(self) -> list[str]:
        """Further remarks on the numbers, the most important first, without repetitions."""
        of_evaluations = self.evaluated.remarks if self.evaluated else []
        return [*dict.fromkeys([*self.notices, *few_texts(self.runs), *of_evaluations])]
