"""What a report contains: the measurements or evaluations with everything that is derived from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from safervlm.reports.comparable import few_texts, warnings
from safervlm.reports.evaluated import Evaluations
from safervlm.reports.extra import ExtraTable
from safervlm.reports.findings import Result, evaluated_findings, group_findings, measured_findings
from safervlm.reports.headline import headline, headline_note
from safervlm.reports.runs import Run


@dataclass(frozen=True)
class Contents:
    """What a report contains.

    Attributes:
        command: Name of the command.
        runs: Measurements; the first is the baseline. Empty for evaluations alone.
        corrected: Result of :func:`safervlm.reports.corrected.corrected_rates`, for the measurements.
        evaluated: Evaluations; None for measurements alone.
        extra: Further tables that the runs allow.
        curve: The plot of the operating curves; None without log-odds.
        calibration: The plot of the judge's calibration; None without labels of people.
        rejected: What could not be used, in a sentence each: labels, log-odds, evaluations.
        results: Further results in a sentence each: of the operating curves.
        notices: What was said about the runs when they were loaded.
    """

    command: str
    runs: Sequence[Run] = ()
    corrected: pd.DataFrame = field(default_factory=pd.DataFrame)
    evaluated: Evaluations | None = None
    extra: Sequence[ExtraTable] = ()
    curve: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    rejected: Sequence[str] = ()
    results: Sequence[str] = ()
    notices: Sequence[str] = ()

    @cached_property
    def differences(self) -> pd.DataFrame:
        """The differences of the evaluations; may be empty."""
        return pd.DataFrame() if self.evaluated is None else self.evaluated.differences

    @cached_property
    def findings(self) -> list[Result]:
        """What the page states first; of measures that both have, that of the measurements."""
        found = measured_findings(self.runs, self.corrected) if self.runs else []
        if self.evaluated is not None:
            there = evaluated_findings(self.evaluated.names, self.evaluated.long, self.evaluated.differences)
            names = [run.name for run in self.runs] or self.evaluated.names
            if names == self.evaluated.names:
                found += [each for each in there if not self.runs or each.key not in ("image_unsafe", "image_safe")]
        return found

    @cached_property
    def stated(self) -> list[Result]:
        """What the sentences at the top state: with groups of training seeds, the groups instead of their runs."""
        tables = {table.name: table.numbers for table in self.extra}
        groups = tables.get("groups", pd.DataFrame())
        if groups.empty:
            return self.findings
        return group_findings(self.runs, groups, tables.get("group_differences", pd.DataFrame()))

    @cached_property
    def headline(self) -> list[str]:
        """The sentences at the top, the last of which states what the intervals are about."""
        stated = self.stated
        return [*headline(stated), headline_note(stated)]

    @cached_property
    def warnings(self) -> list[str]:
        """What may make the headline wrong, the most important first, without repetitions."""
        of_runs = warnings(self.runs) if self.runs else []
        return [*dict.fromkeys([*of_runs, *self.rejected, *(self.evaluated.warnings if self.evaluated else [])])]

    @cached_property
    def remarks(self) -> list[str]:
        """What else has to be known of the numbers, the most important first, without repetitions."""
        of_evaluations = self.evaluated.remarks if self.evaluated else []
        return [*dict.fromkeys([*self.notices, *few_texts(self.runs), *of_evaluations])]
