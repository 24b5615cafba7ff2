"""Which numbers of two measurements may be subtracted, and why others may not."""

from collections.abc import Sequence

import pandas as pd

from safervlm.records import Failure, read_records
from safervlm.reports.runs import Run
from safervlm.results.measures import BOTH, COLUMNS, DIVERSITY
from safervlm.results.scores import overall, unfinished_in
from safervlm.run_folder import RunFolder
from safervlm.statistics.diversity import TEXTS, TOO_FEW
from safervlm.vlm.thinking import many_unfinished


def comparable(frame: pd.DataFrame, base: pd.DataFrame, column: str) -> bool:
    """Returns whether two runs may be subtracted: the same questions and, except for diversity, the same judges.

    Args:
        frame: the run, of :func:`safervlm.results.runs.load_run`.
        base: the run that is subtracted.
        column: a key of :data:`COLUMNS`.
    """
    if asked(frame, column) != asked(base, column):
        return False
    return COLUMNS[column][1] == DIVERSITY or judges(frame, column) == judges(base, column)


def about(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Returns the responses that a column of the overall table is about.

    Args:
        frame: of :func:`safervlm.results.runs.load_run`.
        column: a key of :data:`COLUMNS`.
    """
    _, _, capability, side = COLUMNS[column]
    return frame[frame["capability"].isin(capability.split(" - ")) & ((frame["side"] == side) | (side == BOTH))]


def asked(frame: pd.DataFrame, column: str | None = None) -> frozenset[tuple[str, str, str]]:
    """Returns the questions that a column of the overall table is about: id, prompt and right answer.

    Args:
        frame: of :func:`safervlm.results.runs.load_run`.
        column: a key of :data:`COLUMNS`; None for all questions.
    """
    part = frame if column is None else about(frame, column)
    return frozenset(zip(part["id"], part["prompt"], part["answer"], strict=True))


def judges(frame: pd.DataFrame, column: str | None = None) -> frozenset[tuple[str, str]]:
    """Returns the judges of the responses that a column of the overall table is about: capability and judge.

    Args:
        frame: of :func:`safervlm.results.runs.load_run`.
        column: a key of :data:`COLUMNS`; None for all responses.
    """
    part = frame if column is None else about(frame, column)
    return frozenset(zip(part["capability"], part["judge"], strict=True))


def warnings(runs: Sequence[Run]) -> list[str]:
    """Lists the reasons why the runs' numbers are not, or not fully, comparable, in a sentence each.

    Args:
        runs: the runs; the first is the baseline.
    """
    first, *others = runs
    said = [
        f"{run.name} was asked other questions than {first.name}: where they differ, no difference is shown."
        for run in others
        if asked(run.frame) != asked(first.frame)
    ]
    for run in others:
        same = [column for column in COLUMNS if asked(run.frame, column) == asked(first.frame, column)]
        if any(judges(run.frame, column) != judges(first.frame, column) for column in same):
            said.append(f"{run.name} was classified by another judge than {first.name}: no difference is shown there.")
    said += [
        f"{run.name} has no response, or no verdict on it, to {number} more questions, which are excluded."
        for run in runs
        if (number := missing(run))
    ]
    said += [line for run in runs if (line := many_unfinished(run.name, unfinished_in(run.frame), len(run.frame)))]
    for column, (heading, measure, _, _) in COLUMNS.items():
        rows = [(run.name, overall(run.scores, column)) for run in runs] if measure == DIVERSITY else []
        texts = {name: row["n"] for name, row in rows if row is not None}
        few = {name: row["n"] for name, row in rows if row is not None and row["method"] == TOO_FEW}
        if few and len({*texts.values()}) == 1:
            number = texts.popitem()[1]
            said.append(
                f"{heading} is of {number} texts: that of {TEXTS} texts, which other runs may have, would be lower."
            )
        elif few:
            named = ", ".join(f"{name} ({number} texts)" for name, number in few.items())
            said.append(f"{heading} is of fewer than {TEXTS} texts in {named}: more texts would lower it.")
    return said


def missing(run: Run) -> int:
    """Returns the number of questions that are listed as unanswered or not judgeable and not answered since.

    Args:
        run: the run.
    """
    files = [file for file in (RunFolder(run.folder).failed, RunFolder(run.folder).unjudged) if file.is_file()]
    return len({each.id for file in files for each in read_records(file, Failure)} - {*run.frame["id"]})
