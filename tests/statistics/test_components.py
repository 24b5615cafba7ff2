"""Variance components: recovered from simulated data, by exact cases, and the parts' names."""

import numpy as np
import pytest

from safervlm.statistics import components as c
from safervlm.statistics.components import variance_components

TRUE = {c.CONCEPT: 0.04, c.IMAGE: 0.03, c.CONCEPT_BY_WORDING: 0.02, c.IMAGE_BY_WORDING: 0.01, c.SAMPLING: 0.05}


def simulated(rng, answers, concepts=30, questions=5):
    concept = np.repeat(np.arange(concepts), rng.integers(2, 8, concepts))
    images = len(concept)
    draw = {name: value**0.5 * rng.normal(size=(images, questions, answers)) for name, value in TRUE.items()}
    values = 0.1 * np.arange(questions)[:, None] + draw[c.SAMPLING]
    values = values + draw[c.IMAGE][:, :1, :1] + draw[c.IMAGE_BY_WORDING][:, :, :1]
    return values + draw[c.CONCEPT][concept, :1, :1] + draw[c.CONCEPT_BY_WORDING][concept, :, :1], concept


@pytest.mark.parametrize("answers", [1, 3])
def test_components_are_recovered(answers):
    """The mean over simulated studies; the estimates are unbiased but for those that are cut off at 0."""
    rng = np.random.default_rng(0)
    found = [variance_components(*simulated(rng, answers)) for _ in range(300)]
    true = dict(TRUE)
    if answers == 1:
        true[c.REST] = true.pop(c.IMAGE_BY_WORDING) + true.pop(c.SAMPLING)
    for name, value in true.items():
        estimates = [each[name] for each in found]
        assert np.mean(estimates) == pytest.approx(value, abs=4 * np.std(estimates) / 300**0.5), name
    assert set(found[0]) == {*true, c.WORDING}


def test_variance_between_wordings_is_attributed_to_wording_only():
    right = np.zeros((12, 4, 2))
    right[:, :2] = 1
    found = variance_components(right, np.repeat(np.arange(4), 3))
    assert found.pop(c.WORDING) == pytest.approx(np.var([1, 1, 0, 0], ddof=1))
    assert found == pytest.approx(dict.fromkeys(found, 0.0))


def test_variance_between_images_is_attributed_to_images_only():
    right = np.zeros((12, 4, 2))
    right[::3] = 1
    found = variance_components(right, np.repeat(np.arange(4), 3))
    assert found[c.IMAGE] == pytest.approx(np.var([1, 0, 0], ddof=1))
    assert found[c.CONCEPT] == 0  # each concept has one right image of three: a negative estimate
