"""Several answers to a question: against all subsets of the answers."""

from itertools import combinations

import numpy as np
import pytest

from safervlm.statistics.repeats import flip_rate, wrong_at_least_once

ANSWERS = [(0, 0, 0, 0, 0), (1, 0, 0, 1, 0), (1, 1, 1, 1, 1), (0, 1, 0), (1, 1, 0)]
WRONG, COUNT = (np.array([function(each) for each in ANSWERS], float) for function in (sum, len))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_wrong_at_least_once_of_k_equals_enumeration_of_subsets(k):
    expected = [np.mean([any(subset) for subset in combinations(each, k)]) for each in ANSWERS]
    assert wrong_at_least_once(WRONG, COUNT, k) == pytest.approx(expected)


def test_flip_rate_equals_the_share_of_differing_pairs():
    expected = [np.mean([a != b for a, b in combinations(each, 2)]) for each in ANSWERS]
    assert flip_rate(WRONG, COUNT) == pytest.approx(expected)


def test_too_few_answers_per_question_are_rejected():
    with pytest.raises(ValueError, match="4 answers to a question, but one question has 3"):
        wrong_at_least_once(WRONG, COUNT, 4)
    with pytest.raises(ValueError, match="no pairs"):
        flip_rate(np.zeros(2), np.ones(2))
