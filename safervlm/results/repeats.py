"""Repeated questions: how often one of k responses is wrong, how often two differ, and where the variance comes from.

Repetitions of a question have ids of their own (``data.repeats``) and the same dataset, image, capability and prompt
number. N/A counts as wrong; responses with unfinished thinking are excluded.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from safervlm.results.measures import CONCEPT, NEW_CONCEPTS, TEXT_ONLY, THESE_CONCEPTS, Counts, counted_only, proportion
from safervlm.statistics.components import variance_components
from safervlm.statistics.intervals import Floats
from safervlm.statistics.repeats import flip_rate, wrong_at_least_once

QUESTION = ["dataset", "category", "concept", "image", "capability", "prompt_number"]  # columns that identify one
WRONG_AT_LEAST_ONCE = "wrong at least once"
FLIP_RATE = "flip rate"
VARIANCE = "share of variance"

_COLUMNS = ["capability", "side", "measure", "of", "value", "low", "high", "sampling_unit", "method", "questions"]


def repeat_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Computes the measures of repeated questions.

    Args:
        frame: of :func:`~safervlm.results.runs.load_run`.

    Returns:
        One row per number: capability, side, measure, of, value, low, high, sampling_unit, method, questions (their
        number). ``of`` is the number k of responses for ``wrong at least once``, which has a row for each k up to the
        smallest number of responses to a question, and the component for ``share of variance``. No rows if no question
        was asked twice.
    """
    counted = counted_only(frame).assign(wrong=lambda rows: (rows["label"] != rows["answer"]).astype(float))
    rows: list[dict[str, Any]] = []
    for (capability, side), part in counted.groupby(["capability", "side"], sort=False):
        questions = part.groupby(QUESTION, sort=True)["wrong"].agg(["sum", "size"]).astype(float).reset_index()
        if questions["size"].min() > 1:
            keys = {"capability": capability, "side": side, "questions": len(questions)}
            rows += [keys | row for row in _shares(part, questions)]
            rows += [keys | row for row in _components(part)]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _shares(part: pd.DataFrame, questions: pd.DataFrame) -> Iterator[dict[str, Any]]:
    wrong, asked = questions["sum"].to_numpy(float), questions["size"].to_numpy(float)
    found = [
        (WRONG_AT_LEAST_ONCE, str(k), wrong_at_least_once(wrong, asked, k)) for k in range(1, int(asked.min()) + 1)
    ]
    # One row for each question stands for its responses, so that Counts has the units in its own order.
    first = part.drop_duplicates(QUESTION).sort_values(QUESTION, kind="stable")
    counts = Counts.of(first)
    units = Counts.units(first)
    for measure, of, values in (*found, (FLIP_RATE, "", flip_rate(wrong, asked))):
        hits = pd.Series(values, index=first.index).groupby(units, sort=True).sum().to_numpy(np.float64)
        for sampling_unit in (THESE_CONCEPTS, NEW_CONCEPTS):
            kind = "answers" if first["capability"].iloc[0] == TEXT_ONLY else "images"
            estimate = proportion(hits, counts.asked, counts, sampling_unit, kind)
            yield {
                "measure": measure,
                "of": of,
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
        yield {"measure": VARIANCE, "of": component, "value": value / total if total > 0 else np.nan}


def _balanced(part: pd.DataFrame) -> "tuple[Floats, np.ndarray[Any, np.dtype[np.intp]]]":
    """Images with a response to each question, as often as the least asked question of them; and their concepts."""
    image = part.groupby([*CONCEPT, "image"], sort=True).ngroup().to_numpy()
    question = np.unique(part["prompt_number"].to_numpy(), return_inverse=True)[1]
    number = part.groupby([image, question]).cumcount().to_numpy()
    counts = np.zeros((image.max() + 1, question.max() + 1), int)
    np.add.at(counts, (image, question), 1)
    complete = counts.min(axis=1) > 0
    answers = int(counts[complete].min()) if complete.any() else 0
    array = np.zeros((*counts.shape, max(answers, 1)))
    kept = number < answers
    array[image[kept], question[kept], number[kept]] = 1 - part["wrong"].to_numpy(float)[kept]
    concept = part.groupby(CONCEPT, sort=True).ngroup().to_numpy()
    of_image = np.zeros(len(counts), int)
    of_image[image] = concept
    return array[complete], np.unique(of_image[complete], return_inverse=True)[1]
