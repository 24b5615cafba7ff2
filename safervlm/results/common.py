"""Which questions runs have in common, and differences between runs over these questions.

One rule decides for single runs, for groups of training seeds and for corrected rates whether runs are compared
(:func:`in_common`): over the questions that all of them answered, if these are at least :data:`FEWEST_IN_COMMON` of the
questions that any of them answered, and if the same judges classified the responses. So a few failed questions do not
prevent a comparison, but other data or other prompts do.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from safervlm.protocol import UNSAFE
from safervlm.results.clusters import CONCEPT, STRATUM
from safervlm.results.measures import (
    ACCURACY_NA_WRONG,
    BY_PAIR,
    COLUMNS,
    DIVERSITIES,
    OVER_FLAGGING,
    TOO_FEW_CONCEPTS,
    Estimate,
    about,
    counted_only,
    modality_gap,
)
from safervlm.statistics.differences import difference_of_shares
from safervlm.statistics.diversity import diversity
from safervlm.statistics.intervals import Floats, Numbers, strata_of

QUESTION = ["id", "prompt", "answer", *CONCEPT]  # if one of these differs, it is another question
FEWEST_IN_COMMON = 0.9  # share of the questions that any run answered; with fewer in common, runs are not compared

_NOT_COMPARABLE = f"none: fewer than {100 * FEWEST_IN_COMMON:g} % of the questions in common, or other judges"


@dataclass(frozen=True, slots=True)
class Common:
    """The questions that runs have in common.

    Attributes:
        ids: Those that all runs answered.
        left_out: Those that some of the runs did not answer, or were asked in other words.
        same_judges: Whether the same judges classified the responses.
    """

    ids: frozenset[str]
    left_out: frozenset[str]
    same_judges: bool = True

    @property
    def suffice(self) -> bool:
        """Whether enough questions are in common."""
        return bool(self.ids) and len(self.ids) >= FEWEST_IN_COMMON * (len(self.ids) + len(self.left_out))

    @property
    def comparable(self) -> bool:
        """Whether the runs are compared."""
        return self.suffice and self.same_judges


def in_common(asked: Iterable[frozenset[tuple[str, ...]]], same_judges: bool = True) -> Common:
    """Compares the questions of runs.

    Args:
        asked: Result of :func:`questions_of`, for each run.
        same_judges: Whether the same judges classified the responses.
    """
    every = list(asked)
    ids = frozenset(name for name, *_ in frozenset.intersection(*every))
    return Common(ids, frozenset(name for name, *_ in frozenset.union(*every)) - ids, same_judges)


def common_questions(runs: Sequence[pd.DataFrame], column: str) -> Common:
    """Returns the questions that runs have in common in a column of the overall table.

    Args:
        runs: Each a result of :func:`~safervlm.results.runs.load_run`.
        column: A key of :data:`~safervlm.results.measures.COLUMNS`. Diversity does not depend on judges.
    """
    parts = [about(run, column) for run in runs]
    judged = COLUMNS[column][1] not in DIVERSITIES
    return in_common(map(questions_of, parts), not judged or len({judges_of(part) for part in parts}) == 1)


def questions_of(rows: pd.DataFrame) -> frozenset[tuple[str, ...]]:
    """Returns the questions of responses.

    Args:
        rows: Rows of :func:`~safervlm.results.runs.load_run`.
    """
    return frozenset(zip(*(rows[name] for name in QUESTION), strict=True))


def judges_of(rows: pd.DataFrame) -> frozenset[tuple[str, str]]:
    """Returns the judges of responses: capability and judge.

    Args:
        rows: Rows of :func:`~safervlm.results.runs.load_run`.
    """
    return frozenset(zip(rows["capability"], rows["judge"], strict=True))


@dataclass(frozen=True, slots=True)
class Sums:
    """Responses of several runs to the questions that they have in common, counted by concept.

    Attributes:
        hits: (runs, concepts) right (for over-flagging: flagged) responses of each run.
        answers: (concepts,) number of the responses that count in all runs. There are no concepts if no response counts
            in all runs, or if they are not comparable.
        strata: (concepts,) stratum of each concept (its category).
        left_out: Number of questions that some of the runs did not answer.
    """

    hits: Floats
    answers: Floats
    strata: Numbers
    left_out: int


def sums_by_concept(runs: Sequence[pd.DataFrame], column: str) -> Sums:
    """Counts by concept the responses that a measure is a share of, to the questions that runs have in common.

    Args:
        runs: Each a result of :func:`~safervlm.results.runs.load_run`.
        column: A key of :data:`~safervlm.results.measures.COLUMNS`: an accuracy with N/A as wrong, or over-flagging.
    """
    common = common_questions(runs, column)
    ids = common.ids if common.comparable else frozenset()
    parts = [about(counted_only(run), column) for run in runs]
    for part in parts:
        ids = ids.intersection(part["id"])  # without unfinished thinking
    sums = []
    for part in parts:
        same = part[part["id"].isin(ids)]
        hits = same["label"] == (UNSAFE if COLUMNS[column][1] == OVER_FLAGGING else same["answer"])
        by_concept = hits.astype(float).groupby([same[name] for name in CONCEPT], sort=True)
        sums.append(by_concept.sum().to_numpy(np.float64))
    answers = by_concept.size()
    strata = strata_of(*(answers.index.get_level_values(level).to_numpy() for level in STRATUM))
    return Sums(np.stack(sums), np.asarray(answers, np.float64), strata, len(common.left_out))


def difference_from(frame: pd.DataFrame, base: pd.DataFrame, column: str) -> Estimate:
    """Computes the difference of a measure between two runs, over the questions that they have in common.

    Args:
        frame: The run, a result of :func:`~safervlm.results.runs.load_run`.
        base: The run to subtract.
        column: A key of :data:`~safervlm.results.measures.COLUMNS` with N/A as wrong.

    Returns:
        The difference of the responses that count in both; of shares with an interval over new concepts, paired by
        concept. NaN if the runs are not comparable.
    """
    measure = COLUMNS[column][1]
    if measure in (ACCURACY_NA_WRONG, OVER_FLAGGING):
        sums = sums_by_concept((frame, base), column)
        if not len(sums.answers):
            return Estimate(np.nan, np.nan, np.nan, _NOT_COMPARABLE)
        found = difference_of_shares(sums.hits[0] - sums.hits[1], sums.answers, sums.strata)
        return Estimate(found.value, found.low, found.high, TOO_FEW_CONCEPTS if np.isnan(found.low) else BY_PAIR)
    common = common_questions((frame, base), column)
    if not common.comparable:
        return Estimate(np.nan, np.nan, np.nan, _NOT_COMPARABLE)
    values = []
    for run in (frame, base):
        part = about(counted_only(run), column)
        part = part[part["id"].isin(common.ids)]
        of_texts = measure in DIVERSITIES
        values.append(
            diversity(part["response"].tolist(), part["id"].tolist())[0] if of_texts else modality_gap(part).value
        )
    return Estimate(values[0] - values[1], np.nan, np.nan, "")
