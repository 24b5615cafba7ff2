"""Agreement of people with each other (Krippendorff's alpha) and with the judge: confusion matrix, calibration."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from safervlm.labelling.labels import labels_of_people
from safervlm.labelling.plan import Plan, Strata
from safervlm.protocol import CAPABILITIES, LABELS
from safervlm.statistics.agreement import MISSING, krippendorff_alpha
from safervlm.statistics.calibration import calibration_error, reliability, weighted_share
from safervlm.statistics.intervals import Floats

ALPHA, ACCURACY_OF_JUDGE, CONFUSION = "krippendorff_alpha", "judge_accuracy", "confusion"
ECE, CALIBRATION = "calibration_error", "calibration"
COLUMNS = ("measure", "capability", "category", "judge", "people", "confidence", "labels", "value", "low", "high")


def summary(rows: pd.DataFrame, plan: Plan, by_rater: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    """Tabulates the agreement of people with each other and with the judge, by capability.

    Args:
        rows: Result of :func:`safervlm.labelling.plan.labelable`.
        plan: The run's plan.
        by_rater: Rater -> id -> label.

    Returns:
        Columns measure, capability, category (empty: all), judge, people (labels; empty if not of a confusion matrix),
        confidence (mean, of a bin of the calibration), labels (number of responses that two or more people labelled,
        for alpha; of labelled responses, otherwise), value, low and high (95 % interval; NaN if there is none). For
        ``krippendorff_alpha`` all labels count. The others need a rater who labelled the whole sample, and are
        estimated with the weights of the strata: ``confusion`` (share of all responses of the capability),
        ``judge_accuracy`` and ``calibration_error`` (also by category), and ``calibration`` (accuracy by confidence).
    """
    people = labels_of_people(by_rater, plan)
    lines = [*_alphas(rows, plan, by_rater)]
    if people is not None:
        labelled = with_confidence(rows, people, rows["id"].isin(list(people)))
        for capability in CAPABILITIES:
            own = labelled[labelled["capability"] == capability]
            lines += [{"capability": capability} | line for line in _of_judge(own)] if len(own) else []
    texts = {"category": "", "judge": "", "people": ""}
    return pd.DataFrame(lines, columns=list(COLUMNS)).fillna(texts)


def with_confidence(rows: pd.DataFrame, people: Mapping[str, str], labelled: "pd.Series[bool]") -> pd.DataFrame:
    """Returns the labelled responses with the columns from which their agreement with the judge is computed.

    Args:
        rows: Result of :func:`safervlm.labelling.plan.labelable`.
        people: Id -> label, of the whole sample.
        labelled: Whether each response is in the sample.

    Returns:
        Their rows, with people (label), confidence (the judge's probability of its verdict), agreed (1 if the two
        labels are the same, else 0) and weight (number of responses that it represents).
    """
    strata = Strata.of(rows)
    chosen = labelled.to_numpy(bool)
    weights = np.bincount(strata.numbers) / np.maximum(np.bincount(strata.numbers, chosen), 1)
    found = rows.assign(confidence=strata.confidence, weight=weights[strata.numbers])[chosen]
    found = found.assign(people=found["id"].map(dict(people)))
    return found.assign(agreed=(found["people"] == found["label"]).astype(float))


def _alphas(rows: pd.DataFrame, plan: Plan, by_rater: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    capabilities = dict(zip(rows["id"], rows["capability"], strict=True))
    for capability in CAPABILITIES:
        names = [name for name in plan.sampled if capabilities[name] == capability]
        numbers = {label: number for number, label in enumerate(LABELS[capability])}
        given = [[numbers.get(of.get(name, ""), MISSING) for name in names] for of in by_rater.values()]
        labels = np.array(given, int).reshape(len(given), len(names))
        several = int(((labels != MISSING).sum(0) >= 2).sum())
        if several:
            value = krippendorff_alpha(labels)
            yield {"measure": ALPHA, "capability": capability, "labels": several, "value": value}


def _of_judge(own: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Returns the rows about the judge: confusion matrix, accuracy and calibration, for one capability."""
    yield from _accuracy_and_error(own)
    labels, total = LABELS[own["capability"].iloc[0]], own["weight"].sum()
    for judge in labels:
        for people in labels:
            cell = own[(own["label"] == judge) & (own["people"] == people)]
            share = float(cell["weight"].sum() / total)
            yield {"measure": CONFUSION, "judge": judge, "people": people, "labels": len(cell), "value": share}
    for each in reliability(*_columns(own)):
        ends = _ends((each.accuracy, each.low, each.high))
        yield {"measure": CALIBRATION, "confidence": each.confidence, "labels": each.labels} | ends
    for category, part in own.groupby("category"):
        yield from ({"category": category} | line for line in _accuracy_and_error(part))


def _accuracy_and_error(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    confidence, agreed, weights = _columns(part)
    found = {
        ACCURACY_OF_JUDGE: weighted_share(agreed, weights),
        ECE: calibration_error(confidence, agreed, weights),
    }
    for measure, ends in found.items():
        yield {"measure": measure, "labels": len(part)} | _ends(ends)


def _columns(part: pd.DataFrame) -> tuple[Floats, Floats, Floats]:
    confidence, agreed, weights = (part[name].to_numpy(np.float64) for name in ("confidence", "agreed", "weight"))
    return confidence, agreed, weights


def _ends(found: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), found, strict=True))
