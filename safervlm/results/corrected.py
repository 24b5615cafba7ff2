"""Overall rates corrected for the judge's error, of runs whose sampled responses people have labelled.

Only responses with finished thinking count. N/A counts as wrong, by judge or person. The estimator and its intervals:
:mod:`safervlm.statistics.correction`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from safervlm.errors import RecordError
from safervlm.labelling.labels import LabelFile, labels_of_people
from safervlm.labelling.plan import Plan, Strata, labelable, read_plan
from safervlm.protocol import UNSAFE
from safervlm.results.clusters import CONCEPT, STRATUM, TEXT_ONLY, cluster_numbers, concepts_of
from safervlm.results.common import QUESTION, in_common, questions_of
from safervlm.results.measures import BOTH, COLUMNS, NO_SIDE
from safervlm.run_folder import RunFolder
from safervlm.statistics.correction import (
    Labelled,
    at_least,
    difference_new_concepts,
    difference_this_run,
    interval_over_new_concepts,
    interval_this_run,
)
from safervlm.statistics.differences import Difference
from safervlm.statistics.intervals import Floats, interval_paired

GAP, OVER_FLAGGED = "modality_gap", "over_flagging"
OF_GAP = ("text_only_unsafe", "image_unsafe")  # the gap is the difference of these rates
# The corrected rates: name -> (heading, capability, side).
RATES: dict[str, tuple[str, str, str]] = {
    "image_unsafe": (COLUMNS["image_unsafe"][0], "alignment", "unsafe"),
    "image_safe": (COLUMNS["image_safe"][0], "alignment", "safe"),
    "image_both": ("Image, both sides", "alignment", BOTH),
    OVER_FLAGGED: (COLUMNS[OVER_FLAGGED][0], "alignment", "safe"),
    "text_only_unsafe": (COLUMNS["text_only_unsafe"][0], TEXT_ONLY, "unsafe"),
    "perception": (COLUMNS["perception"][0], "perception", NO_SIDE),
    GAP: (COLUMNS[GAP][0], TEXT_ONLY, "unsafe"),
}
COLUMNS_OF_RATES = [
    *("rate", "value", "corrected", "low_run", "high_run", "low_new", "high_new"),
    *("labels", "responses", "thinking_unfinished"),
]


@dataclass(frozen=True)
class LabelledRun:
    """A run whose sampled responses are labelled.

    Attributes:
        rows: Its responses, a result of :func:`safervlm.labelling.plan.labelable`, with the column ``people``: the
            label of the people; empty if the response was not sampled.
        strata: Their strata.
        unfinished: Capability, side and question of each response that is excluded, as it ended inside its reasoning.
    """

    rows: pd.DataFrame
    strata: Strata
    unfinished: pd.DataFrame

    @classmethod
    def of(cls, rows: pd.DataFrame, people: dict[str, str], unfinished: pd.DataFrame | None = None) -> "LabelledRun":
        """Joins responses and labels.

        Args:
            rows: Result of :func:`safervlm.labelling.plan.labelable`.
            people: Id -> label, of the whole sample.
            unfinished: The responses that ended inside their reasoning; None if there are none.
        """
        rows = rows.assign(people=[people.get(name, "") for name in rows["id"]])
        excluded = (rows[:0] if unfinished is None else unfinished)[["capability", "side", *QUESTION]]
        return cls(rows, Strata.of(rows), excluded)

    def unfinished_in(self, rate: str) -> int:
        """Returns the number of responses that a rate excludes, as they ended inside their reasoning.

        Args:
            rate: A key of :data:`RATES`.
        """
        if rate == GAP:
            return sum(map(self.unfinished_in, OF_GAP))
        return int(_about(self.unfinished, rate).sum())

    def only(self, ids: frozenset[str]) -> "LabelledRun":
        """Returns the run with the responses to some questions only.

        Args:
            ids: The questions.
        """
        kept = self.rows["id"].isin(ids).to_numpy(bool)
        numbers = np.unique(self.strata.numbers[kept], return_inverse=True)[1]
        strata = Strata(self.strata.verdicts[kept], self.strata.confidence[kept], numbers)
        return LabelledRun(self.rows[kept].reset_index(drop=True), strata, self.unfinished)

    @property
    def every_stratum_has_labels(self) -> bool:
        """Whether people have labelled a response of each stratum."""
        return bool(np.bincount(self.strata.numbers, self.rows["people"] != "").all())

    def of_rate(self, rate: str) -> tuple[pd.DataFrame, Labelled] | None:
        """Returns the responses of a rate other than the gap.

        Args:
            rate: A key of :data:`RATES`.

        Returns:
            Their rows, and verdicts, strata and labels; None if there are none.
        """
        rows = self.rows
        own = _about(rows, rate)
        if not own.any():
            return None
        rows = rows[own]
        right = rows["people"] == (UNSAFE if rate == OVER_FLAGGED else rows["answer"])
        strata = np.unique(self.strata.numbers[own], return_inverse=True)[1]
        labelled = (rows["people"] != "").to_numpy(bool)
        return rows, Labelled(self.strata.verdicts[own], strata, labelled, np.asarray(right, np.float64))


def _about(rows: pd.DataFrame, rate: str) -> npt.NDArray[np.bool_]:
    """(rows,) whether responses are those of a rate other than the gap."""
    _, capability, side = RATES[rate]
    return ((rows["capability"] == capability) & ((rows["side"] == side) | (side == BOTH))).to_numpy(bool)


def read_labelled_run(run: Path, frame: pd.DataFrame) -> LabelledRun | None:
    """Joins a run with the labels of people.

    Args:
        run: Run folder.
        frame: Result of :func:`safervlm.results.runs.load_run`.

    Returns:
        The run; None if nobody has labelled a response.

    Raises:
        RecordError: The labels can't be read, are of other responses or verdicts, or no rater's labels are complete.
    """
    rows = labelable(frame)
    plan: Plan | None = None if rows.empty else read_plan(run, rows)
    if plan is None:
        return None
    by_rater = LabelFile(run, rows, plan).by_rater
    people = labels_of_people(by_rater, plan)
    if people is None and by_rater:
        most = max(map(len, by_rater.values()))
        raise RecordError(
            f"{RunFolder(run).labels}: nobody has labelled the whole sample, at most {most} of {len(plan.sampled)}; "
            f"safervlm label {run} resumes"
        )
    return None if people is None else LabelledRun.of(rows, people, frame[frame["unfinished"].astype(bool)])


# --- one run ----------------------------------------------------------------------------------------------------------


def corrected(run: LabelledRun) -> pd.DataFrame:
    """Computes the corrected overall rates of a run.

    Args:
        run: The run.

    Returns:
        One row per rate of :data:`RATES` that was measured: rate, value (as judged), corrected, low_run and high_run
        (95 % interval for these responses, over other samples of labels), low_new and high_new (for new concepts and
        other labels; NaN with fewer than 10), labels (number of labelled responses), responses and
        thinking_unfinished (number of those that are excluded, as they ended inside their reasoning).
    """
    return pd.DataFrame(_rows(run), columns=COLUMNS_OF_RATES)


def _rows(run: LabelledRun) -> list[dict[str, Any]]:
    return [row for rate in RATES if (row := _row(run, rate))]


def _row(run: LabelledRun, rate: str) -> dict[str, Any] | None:
    return _gap_row(run) if rate == GAP else _rate_row(run, rate)


def _rate_row(run: LabelledRun, rate: str) -> dict[str, Any] | None:
    found = run.of_rate(rate)
    if found is None:
        return None
    rows, labelled = found
    judged = rows["label"] == (UNSAFE if rate == OVER_FLAGGED else rows["answer"])
    low_run, high_run = interval_this_run(labelled)
    new = interval_over_new_concepts(labelled, *concepts_of(rows)) or (np.nan, np.nan)
    low_new, high_new = at_least((low_run, high_run), new)
    return {
        "rate": rate,
        "value": float(judged.mean()),
        "corrected": float(labelled.values().mean()),
        "low_run": low_run,
        "high_run": high_run,
        "low_new": low_new,
        "high_new": high_new,
        "labels": int(labelled.labelled.sum()),
        "responses": len(rows),
        "thinking_unfinished": run.unfinished_in(rate),
    }


# --- the modality gap -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """The modality gap of a run: text-only minus image accuracy, a mean over concepts.

    Attributes:
        by_concept: Text, image (corrected accuracies) and judged (the gap as judged), by dataset, category, concept.
        ends: The interval for these responses of each side, (text, image).
        labels: Number of labelled responses about these concepts.
        responses: Number of responses about these concepts.
    """

    by_concept: pd.DataFrame
    ends: tuple[tuple[float, float], tuple[float, float]]
    labels: int
    responses: int

    @property
    def this_run(self) -> Difference:
        """The gap with its interval for these responses."""
        means = self.by_concept[["text", "image"]].mean()
        return difference_this_run(float(means["text"]), self.ends[0], float(means["image"]), self.ends[1])

    @property
    def differences(self) -> Floats:
        """(concepts,) the gap of each concept."""
        return (self.by_concept["text"] - self.by_concept["image"]).to_numpy(np.float64)

    def new_concepts(self, base: "Gap | None" = None) -> tuple[float, float]:
        """Returns the interval of the gap, or of its difference from another run's, for new concepts.

        Args:
            base: The gap that is subtracted, of the same concepts.

        Returns:
            Lower and upper end; NaN if there is none.
        """
        strata = cluster_numbers(self.by_concept, STRATUM)
        if base is None:
            return interval_paired(self.differences, strata) or (np.nan, np.nan)
        # Differences of gaps are between -2 and 2.
        ends = interval_paired((self.differences - base.differences) / 2, strata)
        return (2 * ends[0], 2 * ends[1]) if ends else (np.nan, np.nan)


def gap_of(run: LabelledRun) -> Gap | None:
    """Computes the modality gap of a run.

    Args:
        run: The run.

    Returns:
        The gap; None if no concept was asked about in both ways.
    """
    text, image = map(run.of_rate, OF_GAP)
    if text is None or image is None:
        return None
    sides = {"text": text, "image": image}
    means = []
    for name, (rows, labelled) in sides.items():
        judged = (rows["label"] == rows["answer"]).astype(float)
        z = rows[CONCEPT].assign(z=labelled.values(), judged=judged, n=1).groupby(CONCEPT)
        means.append(z.agg({"z": "mean", "judged": "mean", "n": "sum"}).add_suffix(f"_{name}"))
    both = pd.concat(means, axis=1, join="inner")
    if both.empty:
        return None
    ends, labels, responses = [], 0, 0
    for name, (rows, labelled) in sides.items():
        number = rows[CONCEPT].merge(both.reset_index(), on=CONCEPT, how="left")[f"n_{name}"].to_numpy(np.float64)
        weights = np.nan_to_num(1 / (len(both) * number))
        ends.append(_weighted_interval(labelled, weights))
        labels += int(labelled.labelled[weights > 0].sum())
        responses += int((weights > 0).sum())
    table = pd.DataFrame(
        {"text": both["z_text"], "image": both["z_image"], "judged": both["judged_text"] - both["judged_image"]}
    )
    return Gap(table.reset_index(), (ends[0], ends[1]), labels, responses)


def _weighted_interval(labelled: Labelled, weights: Floats) -> tuple[float, float]:
    """Returns the interval for these responses; verdicts of which no response has a weight are excluded."""
    weighted: npt.NDArray[np.bool_] = np.isin(labelled.verdicts, np.unique(labelled.verdicts[weights > 0]))
    strata = np.unique(labelled.strata[weighted], return_inverse=True)[1]
    kept = Labelled(labelled.verdicts[weighted], strata, labelled.labelled[weighted], labelled.right[weighted])
    return interval_this_run(kept, weights[weighted])


def _gap_row(run: LabelledRun) -> dict[str, Any] | None:
    gap = gap_of(run)
    if gap is None:
        return None
    this_run = gap.this_run
    low_new, high_new = at_least((this_run.low, this_run.high), gap.new_concepts())
    return {
        "rate": GAP,
        "value": float(gap.by_concept["judged"].mean()),
        "corrected": this_run.value,
        "low_run": this_run.low,
        "high_run": this_run.high,
        "low_new": low_new,
        "high_new": high_new,
        "labels": gap.labels,
        "responses": gap.responses,
        "thinking_unfinished": run.unfinished_in(GAP),
    }


# --- two runs ---------------------------------------------------------------------------------------------------------


def corrected_differences(run: LabelledRun, base: LabelledRun) -> pd.DataFrame:
    """Computes the differences of the corrected rates of two runs.

    Args:
        run: The run.
        base: The run that is subtracted.

    Returns:
        Columns as of :func:`corrected`, with differences in ``value`` (NaN if the runs have different judges) and
        ``corrected`` and the numbers of labels and responses of both runs; one row per rate for which both runs have
        enough questions in common (:func:`safervlm.results.common.in_common`), about these questions.
    """
    lines = []
    for rate in RATES:
        pair = _about_common(run, base, rate)
        if pair is None:
            continue
        one, other = (_row(each, rate) for each in pair)
        if one is None or other is None:
            continue
        this_run = difference_this_run(
            one["corrected"],
            (one["low_run"], one["high_run"]),
            other["corrected"],
            (other["low_run"], other["high_run"]),
        )
        low_new, high_new = at_least((this_run.low, this_run.high), _difference_new(*pair, rate))
        same_judges = _judges(run, rate) == _judges(base, rate)
        lines.append(
            {
                "rate": rate,
                "value": one["value"] - other["value"] if same_judges else np.nan,
                "corrected": this_run.value,
                "low_run": this_run.low,
                "high_run": this_run.high,
                "low_new": low_new,
                "high_new": high_new,
                **{key: one[key] + other[key] for key in ("labels", "responses", "thinking_unfinished")},
            }
        )
    return pd.DataFrame(lines, columns=COLUMNS_OF_RATES)


def _about_common(run: LabelledRun, base: LabelledRun, rate: str) -> tuple[LabelledRun, LabelledRun] | None:
    """Returns two runs without the questions of a rate that only one of them answered.

    None if they have too few in common, or if a stratum loses all its labels.
    """
    answered = [pd.concat([run.rows[:0], *_of_rate(each, rate)]) for each in (run, base)]
    rates = OF_GAP if rate == GAP else (rate,)
    unfinished = [pd.concat([each.unfinished[_about(each.unfinished, of)] for of in rates]) for each in (run, base)]
    common = in_common(questions_of(pd.concat(parts)[QUESTION]) for parts in zip(answered, unfinished, strict=True))
    if not common.suffice:
        return None
    ids = common.ids.intersection(*(part["id"] for part in answered))
    one, other = run.only(ids), base.only(ids)
    return (one, other) if one.every_stratum_has_labels and other.every_stratum_has_labels else None


def _judges(run: LabelledRun, rate: str) -> set[str]:
    return {judge for rows in _of_rate(run, rate) for judge in rows["judge"]}


def _of_rate(run: LabelledRun, rate: str) -> list[pd.DataFrame]:
    rates = OF_GAP if rate == GAP else (rate,)
    return [own[0] for each in rates if (own := run.of_rate(each))]


def _difference_new(run: LabelledRun, base: LabelledRun, rate: str) -> tuple[float, float]:
    if rate == GAP:
        gaps = gap_of(run), gap_of(base)
        return gaps[0].new_concepts(gaps[1]) if gaps[0] and gaps[1] else (np.nan, np.nan)
    one, other = run.of_rate(rate), base.of_rate(rate)
    if one is None or other is None:
        return np.nan, np.nan
    found = difference_new_concepts(one[1], other[1], *concepts_of(one[0]))
    return found.low, found.high
