"""Repeated questions: how often one of k responses is wrong, how often two differ, and where the variance comes from.

Repetitions of a question have their own ids (``data.repeats``) and the same dataset, image, capability and prompt
number. N/A counts as wrong; responses with unfinished thinking are excluded.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from safervlm.results.clusters import CONCEPT, IMAGE_OF_CONCEPT, QUESTION, TEXT_ONLY, cluster_numbers, units_of
from safervlm.results.measures import NEW_CONCEPTS, THESE_CONCEPTS, Counts, counted_only, proportion
from safervlm.statistics.components import variance_components
from safervlm.statistics.intervals import Floats
from safervlm.statistics.repeats import flip_rate, wrong_at_least_once

WRONG_AT_LEAST_ONCE = "wrong at least once"
FLIP_RATE = "flip rate"
VARIANCE = "share of variance"

_COLUMNS = ["capability", "side", "measure", "of", "value", "low", "high", "sampling_unit", "method", "questions"]


def repeat_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Computes the measures of repeated questions.

    Args:
        frame: Result of :func:`~safervlm.results.runs.load_run`.

    Returns:
        One row per number: capability, side, measure, of, value, low, high, sampling_unit, method, questions (their
        number). ``of`` is the number k of responses for ``wrong at least once``, which has a row for each k, of the
        questions with at least k responses, and the component for ``share of variance``. No rows if no question has two
        responses.
    """
    counted = counted_only(frame).assign(wrong=lambda rows: (rows["label"] != rows["answer"]).astype(float))
    rows: list[dict[str, Any]] = []
    for (capability, side), part in counted.groupby(["capability", "side"], sort=False):
        questions = part.groupby(QUESTION, sort=True)["wrong"].agg(["sum", "size"]).astype(float).reset_index()
        if questions["size"].max() > 1:
            keys = {"capability": capability, "side": side}
            rows += [keys | row for row in _shares(part, questions)]
            rows += [keys | row for row in _components(part)]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _shares(part: pd.DataFrame, questions: pd.DataFrame) -> Iterator[dict[str, Any]]:
    wrong, asked = questions["sum"].to_numpy(float), questions["size"].to_numpy(float)
    # One row per question represents its responses, so that Counts has the units in its own order.
    first = part.drop_duplicates(QUESTION).sort_values(QUESTION, kind="stable")
    for k in (*range(1, int(asked.max()) + 1), None):  # None: pairs of responses
        there = asked >= (2 if k is None else k)
        own, values = first[there], (wrong[there], asked[there])
        shares = flip_rate(*values) if k is None else wrong_at_least_once(*values, k)
        counts = Counts.of(own)
        hits = np.asarray(pd.Series(shares, index=own.index).groupby(units_of(own), sort=True).sum(), np.float64)
        for sampling_unit in (THESE_CONCEPTS, NEW_CONCEPTS):
            kind = "answers" if own["capability"].iloc[0] == TEXT_ONLY else "images"
            estimate = proportion(hits, counts.asked, counts, sampling_unit, kind)
            yield {
                "measure": FLIP_RATE if k is None else WRONG_AT_LEAST_ONCE,
                "of": "" if k is None else str(k),
                "questions": len(own),
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "sampling_unit": sampling_unit,
                "method": estimate.method,
            }


def _components(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    array, concepts = _balanced(part)
    images, questions, _ = array.shape
    if questions < 2 or len(np.unique(concepts)) < 2 or images <= len(np.unique(concepts)):
        return
    found = variance_components(array, concepts)
    total = sum(found.values())
    for component, value in found.items():
        yield {"measure": VARIANCE, "of": component, "value": value / total if total > 0 else np.nan} | {
            "questions": images * questions
        }


def _balanced(part: pd.DataFrame) -> "tuple[Floats, np.ndarray[Any, np.dtype[np.intp]]]":
    """Returns which responses are right, for images with two or more responses to every question, and their concepts.

    Returns:
        (images, questions, answers) 1 if the answer is right, else 0; and (images,) the concept as a number from 0.
    """
    image = cluster_numbers(part, IMAGE_OF_CONCEPT)
    question = np.unique(part["prompt_number"].to_numpy(), return_inverse=True)[1]
    number = part.groupby([image, question]).cumcount().to_numpy()
    counts = np.zeros((image.max() + 1, question.max() + 1), int)
    np.add.at(counts, (image, question), 1)
    complete = counts.min(axis=1) > 1
    answers = int(counts[complete].min()) if complete.any() else 0
    array = np.zeros((*counts.shape, max(answers, 1)))
    kept = number < answers
    array[image[kept], question[kept], number[kept]] = 1 - part["wrong"].to_numpy(float)[kept]
    concept = cluster_numbers(part, CONCEPT)
    of_image = np.zeros(len(counts), int)
    of_image[image] = concept
    return array[complete], np.unique(of_image[complete], return_inverse=True)[1]
