"""Several training seeds: by hand, special cases, and the rate of true values within simulated intervals."""

import numpy as np
import pytest
from scipy import stats

from safervlm.statistics import intervals, seeds


def test_mean_and_deviation():
    right = np.array([[4.0, 6] * 6, [5, 7] * 6, [6, 8] * 6])
    found = seeds.share_over_seeds(right, np.full(12, 10.0))
    assert (found.value, found.seeds) == (pytest.approx(0.6), 3)
    assert found.deviation == pytest.approx(0.1)


def test_identical_seeds_have_the_interval_of_one_run():
    """No variation between seeds: the interval is that of one run over new concepts."""
    rng = np.random.default_rng(0)
    answers = rng.integers(5, 20, 30).astype(float)
    right = rng.binomial(answers.astype(int), rng.beta(4, 2, 30)).astype(float)
    strata = np.arange(30) % 3
    found = seeds.share_over_seeds(np.tile(right, (4, 1)), answers, strata)
    one = intervals.interval_new_concepts(right, answers, categories=strata)
    assert (found.low, found.high) == pytest.approx(one)
    assert found.deviation == 0


def test_seed_variation_alone_gives_students_t_interval():
    """No variation between concepts: Student's interval of the seeds' differences."""
    shift = np.array([0.1, 0.2, 0.25, 0.35])
    found = seeds.difference_over_seeds(np.outer(shift, np.full(20, 8.0)), np.full(20, 8.0))
    interval = stats.ttest_1samp(shift, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(interval))
    assert found.deviation == pytest.approx(shift.std(ddof=1))


def test_variance_by_hand():
    """One stratum of equal concepts: the classical two-way decomposition."""
    rng = np.random.default_rng(1)
    rates = 0.1 * rng.normal(size=(5, 1)) + 0.1 * rng.normal(size=20) + 0.05 * rng.normal(size=(5, 20))
    found = seeds.difference_over_seeds(rates * 4, np.full(20, 4.0))
    of_concepts = rates.mean(0).var(ddof=1) / 20
    of_seeds = rates.mean(1).var(ddof=1) / 5
    interaction = rates - rates.mean(0) - rates.mean(1, keepdims=True) + rates.mean()
    both = (interaction**2).sum() / (4 * 19) / 100
    squares = (rates.mean(0) - rates.mean()) ** 2
    freedom = min(2 * squares.sum() ** 2 / (squares**2).sum() / (400 * 19 / (19**3 + 1)) - 1, 19)
    variance = of_concepts + of_seeds - both
    assert variance > max(of_concepts, of_seeds)
    nu = variance**2 / (of_concepts**2 / freedom + of_seeds**2 / 4 + both**2 / 76)
    half = stats.t.ppf(0.975, nu) * variance**0.5
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


@pytest.mark.parametrize(("runs", "concepts"), [(2, 30), (1, 30), (3, 9)])
def test_too_few_seeds_or_concepts_have_no_interval(runs, concepts):
    values, answers = np.arange(runs * concepts, dtype=float).reshape(runs, concepts) / 100, np.full(concepts, 9.0)
    for found in (
        seeds.share_over_seeds(values, answers),
        seeds.difference_over_seeds(values, answers),
        seeds.difference_of_groups(np.tile(values, (3, 1)), values, answers),
    ):
        assert np.isfinite(found.value)
        assert np.isnan([found.low, found.high]).all()
    assert np.isnan(seeds.share_over_seeds(values[:1], answers).deviation)


def test_perfect_score_on_all_seeds_has_a_lower_bound_below_1():
    found = seeds.share_over_seeds(np.full((3, 20), 5.0), np.full(20, 5.0))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / intervals.size_if_all_alike(np.full(20, 5.0))))


def test_no_bound_beyond_100_percent():
    right = np.array([[10.0] * 20, [10.0] * 20, [5.0] * 20])
    found = seeds.share_over_seeds(right, np.full(20, 10.0))
    assert 0 <= found.low < found.value < found.high <= 1
    assert found.low < 0.4  # a single seed is wrong in half of its answers


def simulated(rng, recipe, seed_deviation, count=3, concepts=40):
    """Right answers of several runs that share the concepts' difficulty."""
    difficulty = rng.normal(0, 0.1, concepts) if isinstance(recipe, float) else recipe
    runs = rng.normal(0, seed_deviation, (count, 1)) + rng.normal(0, 0.03, (count, concepts))
    return difficulty, rng.binomial(10, np.clip(0.7 + difficulty + runs, 0, 1)).astype(float)


@pytest.mark.parametrize("seed_deviation", [0.0, 0.04])
def test_simulated_coverage(seed_deviation):
    """Rough (400 studies); ``scripts/coverage_seeds.py`` has the table. One run's interval fails where seeds differ."""
    rng, answers = np.random.default_rng(2), np.full(40, 10.0)
    share, single, equal = 0, 0, 0
    for _ in range(400):
        difficulty, first = simulated(rng, 0.0, seed_deviation)
        _, second = simulated(rng, difficulty, seed_deviation)
        found = seeds.share_over_seeds(first, answers)
        share += found.low <= 0.7 <= found.high
        low, high = intervals.interval_new_concepts(first[0], answers)
        single += low <= 0.7 <= high
        between = seeds.difference_of_groups(first, second, answers)
        equal += between.low <= 0 <= between.high
    assert share >= 365
    assert equal >= 365
    if seed_deviation:
        assert single < 320
