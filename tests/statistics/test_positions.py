"""Position bias of multiple choice: by hand, and its expectation by simulation."""

import numpy as np
import pytest

from safervlm.statistics.positions import beyond_chance, positions


def test_position_recall_choice_and_bias_match_hand_calculation():
    right = np.array([0, 0, 1, 1, 2, 2])
    found = positions(np.array([0, 0, 0, 1, 2, -1]), right, 3)
    assert found.recall.tolist() == [1.0, 0.5, 0.5]
    assert found.chosen.tolist() == [0.5, 1 / 6, 1 / 6]
    assert found.bias == pytest.approx(np.std([1, 0.5, 0.5]))


def test_always_choosing_one_position_scores_chance_level():
    right = np.tile(np.arange(4), 25)
    found = positions(np.full(100, 2), right, 4)
    assert beyond_chance(1 / 4, 4) == 0
    assert found.recall.tolist() == [0, 0, 1, 0]
    assert found.bias > 5 * found.bias_by_chance


def test_recall_is_nan_for_a_position_that_is_never_correct():
    found = positions(np.array([0, 1, 2]), np.array([0, 1, 1]), 3)
    assert np.isnan(found.recall[2])
    assert found.bias == pytest.approx(np.std([1, 0.5]))


def test_bias_by_chance_is_that_of_a_model_without_bias():
    rng = np.random.default_rng(0)
    right = np.tile(np.arange(4), 100)
    found = [positions(np.where(rng.random(400) < 0.8, right, (right + 1) % 4), right, 4) for _ in range(500)]
    squares = np.mean([each.bias**2 for each in found])
    assert squares == pytest.approx(np.mean([each.bias_by_chance**2 for each in found]), rel=0.15)
