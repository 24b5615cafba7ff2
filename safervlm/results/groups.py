"""Groups of runs that differ only in their training seed: mean, standard deviation, and differences between groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from safervlm.results.common import sums_by_concept
from safervlm.results.measures import ACCURACY_NA_WRONG, COLUMNS, OVER_FLAGGING
from safervlm.statistics.seeds import (
    FEWEST_SEEDS,
    OVER_SEEDS,
    OverSeeds,
    difference_of_groups,
    difference_over_seeds,
    share_over_seeds,
)

# The columns of `compare` that are shares of responses.
SHARES = [name for name, (_, measure, _, _) in COLUMNS.items() if measure in (ACCURACY_NA_WRONG, OVER_FLAGGING)]

_TOO_FEW_SEEDS = f"none: fewer than {FEWEST_SEEDS} training seeds"
_OTHERWISE = "none: fewer than 10 concepts, or no spread"


def group_table(groups: Mapping[str, Sequence[pd.DataFrame]]) -> pd.DataFrame:
    """Computes each measure's mean over the training seeds of each group.

    Args:
        groups: Name -> runs, each a result of :func:`~safervlm.results.runs.load_run`.

    Returns:
        One row for each group and measure in which its runs are comparable (:mod:`safervlm.results.common`): group,
        measure (a key of ``COLUMNS``), value (the mean), low, high (95 % interval over new concepts and training
        seeds), deviation (standard deviation between seeds), seeds, method, left_out (number of questions that some of
        the runs did not answer), smallest and largest (the runs' values).
    """
    rows = []
    for name, runs in groups.items():
        for column in SHARES:
            sums = sums_by_concept(runs, column)
            if len(sums.answers):
                by_run = sums.hits.sum(1) / sums.answers.sum()
                row = _row(share_over_seeds(sums.hits, sums.answers, sums.strata), sums.left_out)
                rows.append(
                    {"group": name, "measure": column} | row | {"smallest": by_run.min(), "largest": by_run.max()}
                )
    return pd.DataFrame(rows, columns=[*_COLUMNS, "smallest", "largest"])


def group_differences(groups: Mapping[str, Sequence[pd.DataFrame]]) -> pd.DataFrame:
    """Computes the differences between the first group and the others.

    A group of one run (the original model) is fixed: the interval includes the other group's seeds only.

    Args:
        groups: Name -> runs, each a result of :func:`~safervlm.results.runs.load_run`; the first is the one to
            subtract.

    Returns:
        One row for each other group and measure in which all runs of both are comparable, as in :func:`group_table`,
        without smallest and largest, and with ``base``, the name of the first group.
    """
    (base, first), *others = groups.items()
    rows = []
    for name, runs in others:
        for column in SHARES:
            sums = sums_by_concept([*runs, *first], column)
            answers, strata = sums.answers, sums.strata
            if not len(answers):
                continue
            ours, theirs = sums.hits[: len(runs)], sums.hits[len(runs) :]
            if len(first) == 1:
                found = difference_over_seeds(ours - theirs, answers, strata)
            elif len(runs) == 1:
                turned = difference_over_seeds(theirs - ours, answers, strata)
                found = OverSeeds(-turned.value, -turned.high, -turned.low, turned.deviation, turned.seeds)
            else:
                found = difference_of_groups(ours, theirs, answers, strata)
            rows.append({"group": name, "base": base, "measure": column} | _row(found, sums.left_out))
    return pd.DataFrame(rows, columns=[_COLUMNS[0], "base", *_COLUMNS[1:]])


_COLUMNS = ["group", "measure", "value", "low", "high", "deviation", "seeds", "method", "left_out"]


def _row(found: OverSeeds, left_out: int) -> dict[str, Any]:
    method = OVER_SEEDS if not np.isnan(found.low) else _TOO_FEW_SEEDS if found.seeds < FEWEST_SEEDS else _OTHERWISE
    return {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "deviation": found.deviation,
        "seeds": found.seeds,
        "method": method,
        "left_out": left_out,
    }
