"""Values of an evaluation's columns, with intervals: a row per column and sampling unit.

N/A counts as wrong, as in the published evaluation. The sampling unit of each interval (*these concepts*, *new
concepts*, *new images*) is reported with it, as in :mod:`safervlm.results.scores`.

MME follows the official rule (arXiv:2306.13394, ``eval_tool/calculation.py``): for each task the percentage of right
responses plus the percentage of images whose two questions are both right, summed over the ten tasks of perception (at
most 2000) and the four of cognition (at most 800); a question without a response is wrong. LLaVABench
(arXiv:2304.08485): the sum of the model's ratings divided by the sum of the reference's.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from safervlm.io.tables import EXCLUDED
from safervlm.protocol import NOT_APPLICABLE
from safervlm.results.clusters import IMAGE, cluster_numbers
from safervlm.results.measures import NEW_CONCEPTS, THESE_CONCEPTS, Counts, Estimate, proportion
from safervlm.results.mme import mme_images, mme_score, pair_answers
from safervlm.results.scores import unfinished_in
from safervlm.results.suite import Evaluation
from safervlm.results.suite_columns import DIVERSITIES, Column
from safervlm.statistics.diversity import diversity, published_diversity
from safervlm.statistics.intervals import (
    BY_IMAGE,
    BY_TASK,
    FEWEST_CONCEPTS,
    RATIO_BY_IMAGE,
    SHARE_BY_IMAGE,
    interval_ratio,
    interval_sum_of_means,
    interval_these_concepts,
    simulated_coverage,
)

NEW_IMAGES = "new images"
NOT_MEASURED = "none: not measured"


def evaluate(evaluation: Evaluation, wanted: Sequence[Column]) -> pd.DataFrame:
    """Computes the long table of a model: one row per column and sampling unit.

    Args:
        evaluation: The model's responses.
        wanted: Result of :func:`safervlm.results.suite_columns.columns`.

    Returns:
        The columns run, group, column, heading, detail, unit, value, low, high, sampling_unit, method (as in
        :func:`safervlm.results.scores.scores`), coverage (simulated, of the method), n (responses), images, na_rate
        (the share of N/A among them), thinking_unfinished (responses without an answer), missing (questions without a
        response, or without a rating) and excludes (what the interval does not include: the judge's error).

    Raises:
        RecordError: MME's rule can't be applied, see :func:`safervlm.results.mme.mme_images`.
    """
    rows = []
    for column in wanted:
        for sampling_unit, estimate in estimates(evaluation, column):
            part = column.part(evaluation.ratings if column.measure == "ratio" else evaluation.answers)
            missing = len(column.part(evaluation.unanswered))
            if column.measure == "ratio":
                missing += int(part["response"].isna().sum())
                part = part[part["response"].notna()]
            inside = len(column.part(evaluation.unfinished)) + (0 if column.measure == "ratio" else unfinished_in(part))
            na = column.measure != "ratio" and len(part) > 0
            rows.append(
                {
                    "run": evaluation.name,
                    **column.labels,
                    "value": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "sampling_unit": sampling_unit,
                    "method": estimate.method,
                    "coverage": simulated_coverage(estimate.method),
                    "n": len(part),
                    "images": len(part[IMAGE].drop_duplicates()),
                    "na_rate": float((part["label"] == NOT_APPLICABLE).mean()) if na else np.nan,
                    "thinking_unfinished": inside,
                    "missing": missing,
                    "excludes": "" if np.isnan(estimate.low) else EXCLUDED,
                }
            )
    return pd.DataFrame(rows)


def estimates(evaluation: Evaluation, column: Column) -> list[tuple[str, Estimate]]:
    """Computes a column's value with an interval for each sampling unit.

    Args:
        evaluation: The model's responses.
        column: The column.

    Returns:
        Pairs of a sampling unit (empty for diversity, and if not measured) and the estimate; at least one.

    Raises:
        RecordError: MME's rule can't be applied, see :func:`safervlm.results.mme.mme_images`.
    """
    part = column.part(evaluation.ratings if column.measure == "ratio" else evaluation.answers)
    if column.measure in ("mme", "both"):
        part = pair_answers(*map(column.part, (evaluation.answers, evaluation.unanswered, evaluation.unfinished)))
    if column.measure == "ratio":
        part = part.dropna(subset=["response"])
    if not len(part):
        return [("", Estimate(np.nan, np.nan, np.nan, NOT_MEASURED))]
    if column.measure in DIVERSITIES:
        return [("", diversity_estimate(part, column))]
    if column.measure == "mme":
        values = mme_images(part)
        tasks = cluster_numbers(values, ["category"])
        interval = interval_sum_of_means(values["value"].to_numpy(float), tasks)
        return [(NEW_IMAGES, _estimate(mme_score(values), interval, BY_TASK if tasks.any() else BY_IMAGE))]
    if column.measure == "both":
        both = mme_images(part)["both"].to_numpy(float)
        interval = interval_these_concepts(both, np.ones(len(both)), np.zeros(len(both), int))
        return [(NEW_IMAGES, Estimate(float(both.mean()), *interval, SHARE_BY_IMAGE))]
    if column.measure == "ratio":
        model, reference = part["response"].to_numpy(float), part["reference"].to_numpy(float)
        interval = interval_ratio(model, reference, cluster_numbers(part, IMAGE))
        return [(NEW_IMAGES, _estimate(float(model.sum() / reference.sum()), interval, RATIO_BY_IMAGE))]
    counts = Counts.of(part)
    if (part["concept"] != "").all():
        units = "images" if column.capability in ("alignment", "context") else "answers"
        return [
            (sampling_unit, proportion(counts.right, counts.asked, counts, sampling_unit, units))
            for sampling_unit in (THESE_CONCEPTS, NEW_CONCEPTS)
        ]
    value = float(counts.right.sum() / counts.asked.sum())
    interval = interval_these_concepts(counts.right, counts.asked, np.zeros(len(counts.asked), int))
    return [(NEW_IMAGES, Estimate(value, *interval, SHARE_BY_IMAGE))]


def diversity_estimate(part: pd.DataFrame, column: Column) -> Estimate:
    """Computes the diversity of responses, which has no interval.

    Args:
        part: Rows with ``id`` and ``response``.
        column: Determines whether the published measure or that of a fixed number of texts is computed.
    """
    texts = part["response"].tolist()
    value, method = (
        published_diversity(texts) if column.measure == "diversity_published" else diversity(texts, part["id"].tolist())
    )
    return Estimate(value, np.nan, np.nan, method)


def _estimate(value: float, interval: tuple[float, float] | None, method: str) -> Estimate:
    if interval is None:
        return Estimate(value, np.nan, np.nan, f"none: fewer than {FEWEST_CONCEPTS} images")
    return Estimate(value, *interval, method)
