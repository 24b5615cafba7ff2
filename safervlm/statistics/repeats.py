"""Several answers to the same question: how often one of k is wrong, and how often two answers differ.

Both are unbiased for answers that are sampled independently, from any number of them, and both are values per question
between 0 and 1, so that the intervals of clustered shares apply to them.
"""

import numpy as np
from scipy.special import gammaln

from safervlm.statistics.intervals import Floats


def wrong_at_least_once(wrong: Floats, answers: Floats, k: int) -> Floats:
    """Returns the probability that at least one of k answers to a question is wrong.

    ``1 - C(K - c, k) / C(K, k)`` for c wrong ones of K answers: pass@k of Chen et al. (2021, Evaluating large language
    models trained on code, arXiv:2107.03374), of the failures.

    Args:
        wrong: (questions,) number of wrong answers c to each.
        answers: (questions,) number of answers K to each, at least k.
        k: How many answers are considered.

    Returns:
        (questions,) the probabilities.

    Raises:
        ValueError: A question has fewer than k answers.
    """
    if (answers < k).any():
        raise ValueError(f"k: {k} answers to a question, but one question has {int(answers.min())}")
    right = answers - wrong
    ways = gammaln(right + 1) - gammaln(np.maximum(right - k, 0) + 1) - gammaln(answers + 1) + gammaln(answers - k + 1)
    return np.where(right >= k, 1 - np.exp(ways), 1.0)


def flip_rate(wrong: Floats, answers: Floats) -> Floats:
    """Returns the probability that two answers to the same question differ in being right.

    Args:
        wrong: (questions,) number of wrong answers to each.
        answers: (questions,) number of answers to each, at least 2.

    Returns:
        (questions,) the share of pairs of answers of which exactly one is wrong.

    Raises:
        ValueError: A question has a single answer.
    """
    if (answers < 2).any():
        raise ValueError("a question with a single answer has no pairs")
    return wrong * (answers - wrong) / (answers * (answers - 1) / 2)
