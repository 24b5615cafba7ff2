"""Calibration of a judge: against scikit-learn and by hand, and the interval's coverage."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from safervlm.statistics.calibration import bins_of, calibration_error, reliability, weighted_share
from safervlm.statistics.intervals import exact_interval


def sampled(labels, gap, rng):
    confidence = rng.uniform(0.6, 1.0, labels)
    return confidence, (rng.random(labels) < confidence - gap).astype(float)


def test_reliability_points_equal_scikit_learn():
    confidence, right = sampled(100, 0.1, np.random.default_rng(0))
    accuracy, mean = calibration_curve(right, confidence, n_bins=5, strategy="quantile")
    found = reliability(confidence, right, np.ones(100))
    assert [each.accuracy for each in found] == pytest.approx(accuracy)
    assert [each.confidence for each in found] == pytest.approx(mean)
    assert [each.labels for each in found] == [20] * 5
    assert (found[0].low, found[0].high) == pytest.approx(exact_interval(accuracy[0], 20))
    error, low, high = calibration_error(confidence, right, np.ones(100))
    assert error == pytest.approx(np.abs(accuracy - mean).mean())
    assert low <= error <= high


def test_weights_by_hand():
    confidence, right = np.repeat([0.6, 0.9], 10), np.tile([1.0, 1.0, 1.0, 1.0, 0.0], 4)
    weights = np.repeat([3.0, 1.0], 10)
    assert calibration_error(confidence, right, weights)[0] == pytest.approx(0.75 * 0.2 + 0.25 * 0.1)
    share, low, high = weighted_share(np.array([1.0, 0.0]), np.array([3.0, 1.0]))
    assert share == 0.75
    assert (low, high) == pytest.approx(exact_interval(0.75, 1.6))


def test_equal_confidences_or_few_labels_form_one_bin():
    assert set(bins_of(np.ones(100))) == {0}
    assert set(bins_of(np.linspace(0.5, 1, 19))) == {0}
    assert bins_of(np.zeros(0)).size == 0


@pytest.mark.parametrize("gap", [0.0, 0.15])
def test_the_interval_contains_the_true_error(gap):
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        _, low, high = calibration_error(*sampled(60, gap, rng), rng.integers(1, 4, 60).astype(float), seed)
        held += low - 1e-12 <= gap <= high
    assert held >= 0.92 * 200
