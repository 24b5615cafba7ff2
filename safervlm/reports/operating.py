"""The operating curves of a report's runs, with one line each on the terminal."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from safervlm.errors import RecordError
from safervlm.io.tables import say
from safervlm.protocol import REVERSED
from safervlm.reports.runs import Run
from safervlm.reports.tables import percent, signed
from safervlm.results.measures import BOTH, NEW_CONCEPTS, OVERALL
from safervlm.results.operating import (
    ACQUIESCENCE,
    AUROC,
    GAP,
    MASS,
    MEAN,
    OF_ANSWERS,
    OF_ODDS,
    ONE,
    operating,
    read_odds,
)


def operating_tables(
    runs: Sequence[Run], prevalence: float = 0.5, tell: Callable[[str], None] = say
) -> dict[str, pd.DataFrame]:
    """Computes the operating curve of each run with log-odds or the reversed question, and summarises it in a line.

    A run whose log-odds can't be read is excluded with a message.

    Args:
        runs: The runs.
        prevalence: Share of unsafe images for the AUPRC.
        tell: Receives each line; by default it is printed.

    Returns:
        Name of the run -> table of :func:`safervlm.results.operating.operating`.

    Raises:
        ArgumentError: ``prevalence`` is not between 0 and 1.
    """
    tables = {}
    for run in runs:
        try:
            odds = read_odds(run.folder)
        except RecordError as error:
            tell(f"{run.name}: no operating curve: {error}")
            continue
        turned = not run.variants.empty and (run.variants["capability"] == REVERSED).any()
        if odds.empty and not turned:
            continue
        frame = pd.concat([run.frame, run.variants], ignore_index=True)
        tables[run.name] = table = operating(frame, odds, prevalence)
        for line in operating_lines(table):
            tell(f"{run.name}: {line}")
        there = frame["id"].isin(odds["id"])
        asked = frame["capability"].isin(frame.loc[there, "capability"])
        if lacking := int((asked & ~there).sum()):
            tell(
                f"{run.name}: {lacking} of {int(asked.sum())} questions have no log-odds and are not in the curve, "
                "which may be biased; the same measurement computes them again"
            )
    return tables


def operating_lines(table: pd.DataFrame) -> list[str]:
    """Summarises the operating curve of the alignment questions, and acquiescence, in a line each.

    Args:
        table: Result of :func:`safervlm.results.operating.operating`.
    """
    found = []
    auroc = overall_row(table, AUROC)
    if auroc is not None:
        low, high = auroc["low"], auroc["high"]
        line = f"log-odds separate unsafe from safe images with an AUROC of {auroc['value']:.3f}"
        line += "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"
        of_odds, of_answers, gap = (overall_row(table, name) for name in (OF_ODDS, OF_ANSWERS, GAP))
        if of_odds is not None and of_answers is not None and gap is not None:
            line += f"; TPR - FPR {percent(of_odds['value'])} points, of the answers {percent(of_answers['value'])}"
            ends = "" if np.isnan(gap["low"]) else f" [{signed(gap['low'])}, {signed(gap['high'])}]"
            line += f" (gap {signed(gap['value'])}{ends})"
        mass = overall_row(table, MASS)
        found.append(line + ("" if mass is None else f"; median probability of Yes or No {mass['value']:.2f}"))
    yes = table[(table["measure"] == ACQUIESCENCE) & (table["sampling_unit"].isin(["", NEW_CONCEPTS]))]
    if len(yes):
        shares = ", ".join(
            f"{percent(value)} % ({side})" for side, value in dict(zip(yes["side"], yes["value"], strict=True)).items()
        )
        found.append(f"says yes to the first question and to its opposite about {shares} of the images")
    return found


def overall_row(table: pd.DataFrame, measure: str, capability: str = "alignment") -> "pd.Series[Any] | None":
    """Returns the overall row of a measure: for the mean of an image's questions, or for one if only one was asked.

    Args:
        table: Result of :func:`safervlm.results.operating.operating`.
        measure: Value of the column ``measure``.
        capability: Value of the column ``capability``.

    Returns:
        The row; None if there is none.
    """
    rows = table[
        (table["measure"] == measure)
        & (table["capability"] == capability)
        & (table["category"] == OVERALL)
        & (table["side"] == BOTH)
    ]
    for questions in (MEAN, ONE):
        own = rows[rows["questions"] == questions]
        if len(own):
            return own.iloc[0]
    return None
