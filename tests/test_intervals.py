"""The intervals: against exact ones, by hand, and by what they must not do."""

import numpy as np
import pytest
from scipy import stats

from safervlm import intervals


def test_effective_interval_is_clopper_pearson_of_the_effective_size():
    # Variance of 50 independent answers, known for certain.
    low, high = intervals.effective_interval(0.8, 0.8 * 0.2 / 50, np.inf, 10, 200)
    exact = stats.binomtest(40, 50).proportion_ci(method="exact")
    assert (low, high) == (pytest.approx(exact.low), pytest.approx(exact.high))


@pytest.mark.parametrize(("variance", "freedom", "size"), [(1e-9, 5, 200), (0.0, 5, 200), (1.0, 5, 10), (0.01, 0, 10)])
def test_effective_size_stays_within_its_bounds(variance, freedom, size):
    exact = stats.binomtest(round(0.8 * size), size).proportion_ci(method="exact")
    low, high = intervals.effective_interval(0.8, variance, freedom, 10, 200)
    assert (low, high) == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_effective_size_shrinks_with_the_degrees_of_freedom():
    size = 50 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 6)) ** 2
    low, high = intervals.effective_interval(0.8, 0.8 * 0.2 / 50, 6, 10, 200)
    assert low == pytest.approx(stats.beta.ppf(0.025, 0.8 * size, 0.2 * size + 1))
    assert high == pytest.approx(stats.beta.ppf(0.975, 0.8 * size + 1, 0.2 * size))


def caught(monkeypatch):
    """What the intervals hand to `effective_interval`: share, variance, freedom, least, most."""
    calls = []
    monkeypatch.setattr(intervals, "effective_interval", lambda *values: calls.append(values) or (0.0, 1.0))
    return calls


def test_variance_of_these_concepts_by_hand(monkeypatch):
    calls = caught(monkeypatch)
    # Concept 0: images (4/5, 2/5); 1: (5/5, 5/5, 2/4); 2 and 3 have a single image each: (0/5), (3/5).
    right = np.array([4, 2, 5, 5, 2, 0, 3.0])
    answers = np.array([5, 5, 5, 5, 4, 5, 5.0])
    concepts = np.array([0, 0, 1, 1, 1, 2, 3])
    intervals.interval_these_concepts(right, answers, concepts)
    p = 21 / 34
    variance = 0.0
    for stratum in ([0, 1], [2, 3, 4], [5, 6]):
        z = [(right[i] - p * answers[i]) / 34 for i in stratum]
        variance += len(z) / (len(z) - 1) * sum((x - sum(z) / len(z)) ** 2 for x in z)
    assert calls == [pytest.approx((p, variance, 1 + 2 + 1, 34**2 / (6 * 25 + 16), 34))]


def test_a_lonely_single_image_is_measured_from_the_overall_mean(monkeypatch):
    calls = caught(monkeypatch)
    intervals.interval_these_concepts(np.array([1, 0, 1.0]), np.ones(3), np.array([0, 0, 1]))
    # 2 / (2 - 1) * ((1/6)^2 + (1/6)^2) within concept 0, ((1 - 2/3) / 3)^2 of the single.
    assert calls == [pytest.approx((2 / 3, 2 * 2 / 36 + 1 / 81, 1, 3, 3))]


def test_variance_of_new_concepts_is_cr2(monkeypatch):
    calls = caught(monkeypatch)
    rng = np.random.default_rng(0)
    answers = rng.integers(1, 30, 12).astype(float)
    right = rng.binomial(answers.astype(int), 0.7).astype(float)
    intervals.interval_new_concepts(right, answers)
    # By matrices, as Bell and McCaffrey write it: A_g = (I - H_gg)^(-1/2) for the regression on a constant.
    total = answers.sum()
    share = right.sum() / total
    squares = []
    for r, n in zip(right.astype(int), answers.astype(int), strict=True):
        residual = np.r_[np.ones(r), np.zeros(n - r)] - share
        values, vectors = np.linalg.eigh(np.eye(n) - np.ones((n, n)) / total)
        squares.append((np.ones(n) @ (vectors * values**-0.5) @ vectors.T @ residual / total) ** 2)
    freedom = min(sum(squares) ** 2 / sum(s**2 for s in squares), 11)
    assert calls == [pytest.approx((share, sum(squares), freedom, total**2 / (answers**2).sum(), total))]


def test_new_concepts_need_ten():
    assert intervals.interval_new_concepts(np.ones(9), np.full(9, 2.0)) is None
    assert intervals.interval_new_concepts(np.ones(10), np.full(10, 2.0)) is not None


def test_nothing_wrong_is_not_certainty():
    low, high = intervals.interval_these_concepts(np.full(8, 5.0), np.full(8, 5.0), np.arange(8) // 2)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 8)), 1.0)  # eight images, not forty answers
    interval = intervals.interval_new_concepts(np.full(12, 20.0), np.full(12, 20.0))
    assert interval == (pytest.approx(0.025 ** (1 / 12)), 1.0)
    low, high = intervals.interval_these_concepts(np.zeros(1), np.full(1, 5.0), np.zeros(1, int))
    assert (low, high) == (0.0, pytest.approx(0.975))


def test_one_image_a_concept_takes_the_images_as_they_are():
    # All single: the variance is a collapsed one, and independent images vary at most as a binomial does.
    right = np.array([1, 1, 1, 0, 1, 1, 1, 1.0])
    exact = stats.binomtest(7, 8).proportion_ci(method="exact")
    interval = intervals.interval_these_concepts(right, np.ones(8), np.arange(8))
    assert interval == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_effective_freedom_counts_the_concepts_that_carry_the_variance():
    assert intervals.effective_freedom(np.array([1.0, 1.0, 0.0, 0.0, 0.0])) == 2
    assert intervals.effective_freedom(np.array([3.0, 1.0, 0.0])) == pytest.approx(16 / 10)
    assert intervals.effective_freedom(np.ones(8)) == 7


def test_paired_interval():
    rng = np.random.default_rng(1)
    differences = np.r_[0.3 + 0.1, 0.3 - 0.1].repeat(6)  # all squares alike: Student's own degrees of freedom
    low, high = intervals.interval_paired(differences)
    theirs = stats.ttest_1samp(differences, 0).confidence_interval()
    assert (low, high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    differences = np.r_[np.zeros(18), 0.9, 0.8]  # two concepts carry it all
    low, high = intervals.interval_paired(differences)
    theirs = stats.ttest_1samp(differences, 0).confidence_interval()
    half = stats.t.ppf(0.975, intervals.effective_freedom((differences - differences.mean()) ** 2)) * stats.sem(
        differences
    )
    assert (low, high) == (pytest.approx(differences.mean() - half), pytest.approx(differences.mean() + half))
    assert high - low > 1.5 * (theirs.high - theirs.low)
    assert intervals.interval_paired(rng.random(9)) is None
    assert intervals.interval_paired(np.full(20, 0.5)) is None
    assert intervals.interval_paired(np.r_[np.ones(11), -1.0])[1] == 1.0


def test_the_difference_of_two_runs_is_the_paired_t_interval_where_concepts_are_alike():
    answers = np.full(12, 8.0)
    first = np.array([2.0, 6.0] * 6)
    second = first + np.array(
        [1.0, 3.0, 3.0, 1.0] * 3
    )  # every concept lies as far from the mean: 11 degrees of freedom
    expected = stats.ttest_rel(second / 8, first / 8).confidence_interval(0.95)
    assert intervals.interval_difference(second - first, answers) == pytest.approx((expected.low, expected.high))


def test_the_difference_of_two_runs_weighs_concepts_by_their_answers_and_is_cr2():
    answers = np.array([4.0, 8, 12, 4, 8, 12, 4, 8, 12, 20])
    differences = np.array([2.0, -1, 3, 0, 4, 6, 1, 2, -2, 10])
    low, high = intervals.interval_difference(differences, answers)
    value = differences.sum() / answers.sum()
    assert (low + high) / 2 == pytest.approx(value)
    squares = [
        (d - value * n) ** 2 / (1 - n / answers.sum()) / answers.sum() ** 2
        for d, n in zip(differences, answers, strict=True)
    ]
    freedom = min(sum(squares) ** 2 / sum(s**2 for s in squares), 9)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, freedom) * sum(squares) ** 0.5)
    assert intervals.interval_difference(differences[:9], answers[:9]) is None
    assert intervals.interval_difference(answers / 4, answers) is None  # the same of every concept


@pytest.mark.parametrize("rate", [0.5, 0.97])
def test_coverage(rate):
    """A short form of scripts/coverage.py: 40 uneven concepts, intra-concept correlation .3."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 30, 40)
    concepts = np.repeat(np.arange(40), sizes)
    beta = 1 / 0.3 - 1
    held = []
    for _ in range(400):
        truth = rng.beta(rate * beta, (1 - rate) * beta, 40)
        right = (rng.random(len(concepts)) < truth[concepts]).astype(float)
        low, high = intervals.interval_these_concepts(right, np.ones_like(right), concepts)
        new_low, new_high = intervals.interval_new_concepts(np.bincount(concepts, right), sizes.astype(float))
        held.append((low <= truth[concepts].mean() <= high, new_low <= rate <= new_high))
    assert (np.mean(held, axis=0) >= 0.93).all(), np.mean(held, axis=0)
