"""The table of rates that are corrected for the judge's error, for the runs that people have labelled."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from safervlm.errors import RecordError
from safervlm.io.tables import say
from safervlm.reports.runs import Run
from safervlm.reports.tables import percent, records, signed
from safervlm.results.corrected import (
    COLUMNS_OF_RATES,
    RATES,
    LabelledRun,
    corrected,
    corrected_differences,
    read_labelled_run,
)
from safervlm.statistics.correction import BY_LABELS, OF_NEW_CONCEPTS, OF_THIS_RUN
from safervlm.statistics.intervals import coverage

CORRECTED_NOTE = (
    "Corrected: what people would say of all responses, estimated from their labels of a sample. The intervals include "
    "the judge's error: for this run (these responses, other samples of labels) and for new concepts (and other "
    "labels). N/A counts as wrong; responses with unfinished thinking are excluded, and counted where there are any. "
    f"Simulated coverage of a rate's intervals: {coverage(BY_LABELS, OF_THIS_RUN)} for this run, "
    f"{coverage(BY_LABELS, OF_NEW_CONCEPTS)} for new concepts."
)


def labelled_runs(runs: Sequence[Run], tell: Callable[[str], None] = say) -> dict[str, LabelledRun]:
    """Returns the runs that people have labelled; one whose labels can't be used is excluded with a message.

    Args:
        runs: The runs.
        tell: Receives the message on each excluded run; by default it is printed.

    Returns:
        Name -> run.
    """
    labelled = {}
    for run in runs:
        try:
            found = read_labelled_run(run.folder, run.frame)
        except RecordError as error:
            tell(f"{run.name}: not corrected for the judge's error: {error}")
            continue
        if found is not None:
            labelled[run.name] = found
    return labelled


def corrected_rates(labelled: Mapping[str, LabelledRun], first: str) -> pd.DataFrame:
    """Computes the corrected rates of the labelled runs, and their differences from the first run if it is labelled.

    Args:
        labelled: Result of :func:`labelled_runs`.
        first: Name of the report's first run, the baseline.

    Returns:
        Columns run, minus (the run that is subtracted; empty for a rate) and those of
        :func:`safervlm.results.corrected.corrected`; empty if no run is labelled.
    """
    tables = [corrected(each).assign(run=name, minus="") for name, each in labelled.items()]
    if first in labelled:
        tables += [
            corrected_differences(each, labelled[first]).assign(run=name, minus=first)
            for name, each in labelled.items()
            if name != first
        ]
    columns = ["run", "minus", *COLUMNS_OF_RATES]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def corrected_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the rows of a table for display, in percent or points.

    Args:
        table: Result of :func:`corrected_rates`.

    Returns:
        Rows with run, minus, rate (the heading), judged, corrected, this_run, new_concepts (intervals, ``-`` if there
        is none), labels, responses and thinking_unfinished, as texts.
    """
    return [
        {
            "run": row["run"],
            "minus": row["minus"],
            "rate": RATES[row["rate"]][0],
            "judged": (signed if row["minus"] else percent)(row["value"]),
            "corrected": (signed if row["minus"] else percent)(row["corrected"]),
            **{
                name: "-"
                if np.isnan(row[f"low_{of}"])
                else f"[{percent(row[f'low_{of}'])}, {percent(row[f'high_{of}'])}]"
                for name, of in (("this_run", "run"), ("new_concepts", "new"))
            },
            **{key: str(row[key]) for key in ("labels", "responses", "thinking_unfinished")},
        }
        for row in records(table)
    ]
