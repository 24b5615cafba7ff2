"""Agreement of people with each other (Krippendorff's alpha) and with the judge (confusion matrix)."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from safervlm.labelling.labels import labels_of_people
from safervlm.labelling.plan import Plan
from safervlm.protocol import CAPABILITIES, LABELS
from safervlm.statistics.agreement import MISSING, krippendorff_alpha

ALPHA, ACCURACY_OF_JUDGE, CONFUSION = "krippendorff_alpha", "judge_accuracy", "confusion"


def summary(rows: pd.DataFrame, plan: Plan, by_rater: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    """Tabulates the agreement of people with each other and with the judge, by capability.

    Args:
        rows: of :func:`safervlm.labelling.plan.labelable`.
        plan: The run's plan.
        by_rater: Rater -> id -> label.

    Returns:
        Columns measure, capability, judge, people (labels; empty if not of a confusion matrix), labels (number of
        responses that two or more people labelled, for alpha; of labelled responses, otherwise) and value. For
        ``krippendorff_alpha`` all labels count. For ``judge_accuracy`` and ``confusion``, which need a rater who
        labelled the whole sample, the value is the share of all responses of the capability, estimated with the weights
        of the strata.
    """
    lines = [*_alphas(rows, plan, by_rater), *_confusion(rows, plan, labels_of_people(by_rater, plan))]
    return pd.DataFrame(lines, columns=["measure", "capability", "judge", "people", "labels", "value"])


def _alphas(rows: pd.DataFrame, plan: Plan, by_rater: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[Any, ...]]:
    capabilities = dict(zip(rows["id"], rows["capability"], strict=True))
    for capability in CAPABILITIES:
        names = [name for name in plan.sampled if capabilities[name] == capability]
        numbers = {label: number for number, label in enumerate(LABELS[capability])}
        given = [[numbers.get(of.get(name, ""), MISSING) for name in names] for of in by_rater.values()]
        labels = np.array(given, int).reshape(len(given), len(names))
        several = int(((labels != MISSING).sum(0) >= 2).sum())
        if several:
            yield ALPHA, capability, "", "", several, krippendorff_alpha(labels)


def _confusion(rows: pd.DataFrame, plan: Plan, people: Mapping[str, str] | None) -> Iterator[tuple[Any, ...]]:
    if people is None:
        return
    weights = np.array(plan.sizes) / np.maximum(plan.wanted, 1)
    labelled = rows[rows["id"].isin(list(people))]
    labelled = labelled.assign(
        people=labelled["id"].map(people), weight=labelled["id"].map(plan.sampled).map(dict(enumerate(weights)))
    )
    for capability in CAPABILITIES:
        own = labelled[labelled["capability"] == capability]
        if own.empty:
            continue
        total = own["weight"].sum()
        right = own["weight"][own["people"] == own["label"]].sum()
        yield ACCURACY_OF_JUDGE, capability, "", "", len(own), float(right / total)
        for judge in LABELS[capability]:
            for label in LABELS[capability]:
                cell = own[(own["label"] == judge) & (own["people"] == label)]
                yield CONFUSION, capability, judge, label, len(cell), float(cell["weight"].sum() / total)
