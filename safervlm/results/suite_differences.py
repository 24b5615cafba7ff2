"""Differences between the evaluations of two models, paired by the items that both were asked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from safervlm.io.tables import EXCLUDED
from safervlm.results.clusters import CONCEPT, IMAGE, IMAGE_OF_TASK, cluster_numbers
from safervlm.results.measures import NEW_CONCEPTS
from safervlm.results.mme import mme_images, pair_answers
from safervlm.results.scores import changed_answers
from safervlm.results.suite import Evaluation, stage_settings
from safervlm.results.suite_columns import DIVERSITIES, Column
from safervlm.results.suite_estimates import NEW_IMAGES, diversity_estimate
from safervlm.statistics.differences import (
    RATIOS_BY_IMAGE,
    SHARES_BY_CONCEPT,
    SHARES_BY_IMAGE,
    SHARES_BY_ITEM,
    SUMS_BY_TASK,
    Difference,
    difference_of_items,
    difference_of_ratios,
    difference_of_shares,
    difference_of_sums_of_means,
    holm,
)
from safervlm.statistics.intervals import FEWEST_CONCEPTS, simulated_coverage, strata_of


def compare_suites(evaluation: Evaluation, original: Evaluation, wanted: Sequence[Column]) -> pd.DataFrame:
    """Compares a model with the original one on the same items: one row per column.

    Args:
        evaluation: The model.
        original: The model that is subtracted.
        wanted: Result of :func:`safervlm.results.suite_columns.columns`.

    Returns:
        The columns run, group, column, heading, detail, unit, difference (the model's number minus the original's),
        low, high (95 % interval), p (two-sided), p_holm (Holm's, over the model's columns without details),
        sampling_unit (of the interval), method, coverage (simulated, of the method), n (items that both answered),
        regressions and improvements (items that turned wrong, and right; for ratings those that decreased, and
        increased), excludes (what the interval does not include: the judge's error).

    Raises:
        RecordError: A manifest can't be read, or MME's rule can't be applied (:func:`safervlm.results.mme.mme_images`).
    """
    rows = []
    for column in wanted:
        comparison = _compare(evaluation, original, column)
        rows.append(
            {
                "run": evaluation.name,
                **column.labels,
                "difference": comparison.difference.value,
                "low": comparison.difference.low,
                "high": comparison.difference.high,
                "p": comparison.difference.p,
                "sampling_unit": comparison.sampling_unit,
                "method": comparison.method,
                "coverage": simulated_coverage(comparison.method),
                "n": comparison.items,
                "regressions": comparison.regressions,
                "improvements": comparison.improvements,
                "excludes": "" if np.isnan(comparison.difference.low) else EXCLUDED,
            }
        )
    table = pd.DataFrame(rows)
    table.insert(10, "p_holm", holm(table["p"].mask(table["detail"]).to_numpy(float)))
    return table


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference of a column between two models.

    Attributes:
        difference: The number with its interval and p-value.
        sampling_unit: The interval's sampling unit; empty for diversity, and if there is no difference.
        method: Name of the interval's method, or the reason why there is no interval or no difference.
        items: Number of items that both answered.
        regressions: Items that only the original has right; of ratings, those that decreased.
        improvements: Items that only the model has right; of ratings, those that increased.
    """

    difference: Difference
    sampling_unit: str = ""
    method: str = ""
    items: int = 0
    regressions: int = 0
    improvements: int = 0


def _compare(evaluation: Evaluation, original: Evaluation, column: Column) -> Comparison:
    both = [column.part(e.ratings if column.measure == "ratio" else e.answers) for e in (evaluation, original)]
    if not all(map(len, both)):
        return Comparison(Difference(np.nan), method="none: not measured in both")
    if (reason := _incomparable(evaluation, original, column, *both)) is not None:
        return Comparison(Difference(np.nan), method=f"none: {reason}")
    if column.measure in DIVERSITIES:
        common = set(both[0]["id"]) & set(both[1]["id"])
        if not common:
            return Comparison(Difference(np.nan), method="none: no item has a response in both")
        values = [diversity_estimate(part[part["id"].isin(common)], column) for part in both]
        return Comparison(Difference(values[0].value - values[1].value), method=values[0].method, items=len(common))
    if column.measure == "ratio":
        return _compare_ratios(*both)
    right = [part.set_index("id")["label"] == part.set_index("id")["answer"] for part in both]
    items = pd.DataFrame({"now": right[0], "before": right[1]}).dropna().astype(bool)  # what both answered
    regressions, improvements = (
        int((items["before"] & ~items["now"]).sum()),
        int((items["now"] & ~items["before"]).sum()),
    )
    if column.measure in ("mme", "both"):
        parts = [
            pair_answers(*map(column.part, (e.answers, e.unanswered, e.unfinished))) for e in (evaluation, original)
        ]
        which = "value" if column.measure == "mme" else "both"
        now, before = (mme_images(part).set_index(IMAGE_OF_TASK)[which] for part in parts)
        change = (now - before).dropna().sort_index()  # pandas subtracts by index
        if not len(change):
            return Comparison(Difference(np.nan), method="none: no item has a response in both")
        if column.measure == "both":
            regressions, improvements = int((change < 0).sum()), int((change > 0).sum())
            difference = difference_of_items(regressions, improvements, len(change))
            return Comparison(difference, NEW_IMAGES, SHARES_BY_ITEM, len(change), regressions, improvements)
        tasks = change.groupby(level="category").ngroup().to_numpy()
        difference = difference_of_sums_of_means(change.to_numpy(float), tasks)
        return _with_method(difference, NEW_IMAGES, SUMS_BY_TASK, "images", len(items), regressions, improvements)
    first = both[0].set_index("id").loc[items.index]
    change = items["now"].astype(float) - items["before"].astype(float)
    if (first["concept"] != "").all():
        clusters = change.groupby([first[name] for name in CONCEPT])
        sampling_unit, method, units = NEW_CONCEPTS, SHARES_BY_CONCEPT, "concepts"
    else:
        clusters = change.groupby([first[name] for name in IMAGE])
        sampling_unit, method, units = NEW_IMAGES, SHARES_BY_IMAGE, "images"
        if len(clusters) == len(items):  # one question per image: independent items
            return Comparison(
                difference_of_items(regressions, improvements, len(items)),
                sampling_unit,
                SHARES_BY_ITEM,
                len(items),
                regressions,
                improvements,
            )
    sums = clusters.sum()
    datasets = sums.index.get_level_values(0).to_numpy()
    # New concepts are sampled within the categories of each dataset.
    strata = strata_of(
        datasets, sums.index.get_level_values(1).to_numpy() if sampling_unit == NEW_CONCEPTS else datasets
    )
    answered = np.asarray(clusters.size(), np.float64)
    difference = difference_of_shares(np.asarray(sums, np.float64), answered, strata)
    return _with_method(difference, sampling_unit, method, units, len(items), regressions, improvements)


def _incomparable(
    evaluation: Evaluation, original: Evaluation, column: Column, now: pd.DataFrame, before: pd.DataFrame
) -> str | None:
    """Returns the reason why the two must not be subtracted; None if they are comparable."""
    asked = [
        {*part["id"], *column.part(e.unanswered)["id"], *column.part(e.unfinished)["id"]}
        for part, e in ((now, evaluation), (before, original))
    ]
    if asked[0] != asked[1]:
        return "they were asked other questions"
    pairs = now.merge(before, on="id", suffixes=("", "_before"))
    for name, reason in (("prompt", "asked in other words"), ("answer", "another answer is correct")):
        if (pairs[name] != pairs[f"{name}_before"]).any():
            return f"{reason}, for example of {pairs['id'][pairs[name] != pairs[f'{name}_before']].iloc[0]}"
    if set(now["judge"]) != set(before["judge"]):
        return "classified by another judge"
    shown, shown_before = (_images(e, {*now["dataset"]}, column.capability) for e in (evaluation, original))
    if any(shown[name] != shown_before[name] for name in shown.keys() & shown_before.keys()):
        return "they were asked about other images"
    return None


def _images(evaluation: Evaluation, datasets: set[str], capability: str) -> dict[str, str]:
    """Returns the image hashes of the datasets in the manifest: name in the suite -> hash of names and sizes."""
    if capability == "context_text_only":
        return {}  # the images are not shown
    data = stage_settings(evaluation.folder, "measure").get("data", {})
    return {
        name: described["images"]
        for name, described in data.get("sets", {"": data}).items()
        if "images" in described
        and datasets & {*described.get("names", [described.get("name")])}
        and ("contexts" in described) == (capability == "context")
    }


def _compare_ratios(now: pd.DataFrame, before: pd.DataFrame) -> Comparison:
    pairs = now.merge(before[["id", "reference", "response"]], on="id", suffixes=("", "_before")).dropna()
    if not len(pairs):
        return Comparison(Difference(np.nan), method="none: not rated in both")
    said, reference, said_before, reference_before = (
        np.asarray(pairs[name], np.float64) for name in ("response", "reference", "response_before", "reference_before")
    )
    difference = difference_of_ratios(said, reference, said_before, reference_before, cluster_numbers(pairs, IMAGE))
    regressions, improvements = int((said < said_before).sum()), int((said > said_before).sum())
    return _with_method(difference, NEW_IMAGES, RATIOS_BY_IMAGE, "images", len(pairs), regressions, improvements)


def _with_method(
    difference: Difference, sampling_unit: str, method: str, units: str, items: int, regressions: int, improvements: int
) -> Comparison:
    if np.isnan(difference.low):
        method = f"none: fewer than {FEWEST_CONCEPTS} {units}"
    return Comparison(difference, sampling_unit, method, items, regressions, improvements)


def flips(evaluation: Evaluation, original: Evaluation, column: Column) -> pd.DataFrame:
    """Returns the questions of a column that one of the two models answers right and the other wrong.

    Args:
        evaluation: The model.
        original: The model that it is compared with.
        column: The column.

    Returns:
        The model's rows of the responses, with response_before and label_before of the original, and improved: whether
        the response turned right.
    """
    return changed_answers(*(column.part(e.answers) for e in (evaluation, original)))
