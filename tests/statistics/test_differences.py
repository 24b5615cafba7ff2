"""Differences between runs: against published examples, exact distributions, and by hand."""

import numpy as np
import pytest
from satterthwaite import freedom_of
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from safervlm.statistics import differences, intervals


def same(difference, value, low, high, p, **tolerance):
    found = (difference.value, difference.low, difference.high, difference.p)
    assert found == pytest.approx((value, low, high, p), nan_ok=True, **tolerance)


# --- shares -----------------------------------------------------------------------------------------------------------


def test_difference_of_shares_equals_paired_t_test_for_equal_cluster_sizes():
    d = np.array([1.0, 3.0, 3.0, 1.0] * 3) / 8
    theirs = stats.ttest_1samp(d, 0)
    ci = theirs.confidence_interval(0.95)
    same(differences.difference_of_shares(8 * d, np.full(12, 8.0)), d.mean(), ci.low, ci.high, theirs.pvalue)


def test_shares_weigh_clusters_by_their_responses_and_are_cr2():
    answers = np.array([4.0, 8, 12, 4, 8, 12, 4, 8, 12, 20])
    change = np.array([2.0, -1, 3, 0, 4, 6, 1, 2, -2, 10])
    found = differences.difference_of_shares(change, answers)
    value = change.sum() / answers.sum()
    squares = [
        (d - value * n) ** 2 / (1 - n / answers.sum()) / answers.sum() ** 2
        for d, n in zip(change, answers, strict=True)
    ]
    freedom = freedom_of(squares)
    assert freedom < 9
    error = sum(squares) ** 0.5
    half = stats.t.ppf(0.975, freedom) * error
    same(found, value, value - half, value + half, 2 * stats.t.sf(value / error, freedom))
    assert np.isnan(differences.difference_of_shares(change[:9], answers[:9]).low)


@pytest.mark.parametrize("seed", range(30))
def test_p_is_below_5_percent_exactly_when_the_interval_excludes_0(seed):
    rng = np.random.default_rng(seed)
    found = differences.difference_of_shares(rng.integers(-1, 4, 15).astype(float), np.full(15, 8.0))
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    found = differences.difference_of_shares(np.full(12 + seed, 1.0), np.full(12 + seed, 8.0))  # all alike
    assert (found.p < 0.05) == (found.low > 0)
    strata = np.repeat([0, 1], 15)
    found = differences.difference_of_sums_of_means(rng.choice([-50.0, 0, 0, 50, 150], 30), strata)
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_zero_differences_have_the_clopper_pearson_bound():
    """Clopper-Pearson for 0 of n: the share of clusters that differ is at most 1 - .025^(1/n)."""
    most = stats.binomtest(0, 40).proportion_ci(method="exact").high
    same(differences.difference_of_shares(np.zeros(40), np.full(40, 5.0)), 0, -most, most, 1)


def test_equal_differences_in_all_clusters_have_exact_bounds():
    other = stats.binomtest(0, 12).proportion_ci(method="exact").high
    # Up to a quarter of the clusters may have another difference: -1 or 1.
    expected = (0.4, 0.4 * (1 - other) - other, 0.4 * (1 - other) + other, 2 / 1.4**12)
    same(differences.difference_of_shares(np.full(12, 2.0), np.full(12, 5.0)), *expected)
    # If every cluster changes completely, it is the sign test.
    same(differences.difference_of_shares(np.full(12, -5.0), np.full(12, 5.0)), -1, -1, -1 + 2 * other, 2 / 2**12)


def test_a_difference_is_no_larger_than_the_share_of_clusters_that_differ():
    """One of 100: Student's interval with one degree of freedom would reach .137."""
    most = stats.binomtest(1, 100).proportion_ci(method="exact").high
    found = differences.difference_of_shares(np.eye(100)[0], np.ones(100))
    assert (found.value, found.low, found.high) == pytest.approx((0.01, -most, most))
    assert found.p == pytest.approx(0.5, abs=0.01)


def test_differences_within_categories():
    """As in a regression on categories: only what differs within them is uncertain, with concepts - categories."""
    rng = np.random.default_rng(0)
    strata, answers = np.repeat(np.arange(3), 8), np.full(24, 10.0)
    change = np.array([0.0, 3.0, 6.0])[strata] + rng.integers(-1, 2, 24)
    found = differences.difference_of_shares(change, answers, strata)
    within = sum((change[strata == s] / 10).var(ddof=1) / 8 / 9 for s in range(3))
    squares = intervals.ratio_squares(change, answers, strata)
    freedom = freedom_of(squares, strata)
    half = stats.t.ppf(0.975, freedom) * within**0.5
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    plain = differences.difference_of_shares(change, answers)
    assert found.high - found.low < 0.5 * (plain.high - plain.low)


# --- sums of means ----------------------------------------------------------------------------------------------------


def test_difference_of_sums_matches_hand_calculation():
    """Two strata: a quarter of an image with a full decrease and a quarter of one with a full increase."""
    values = [np.array([0.0] * 10 + [50, 150, -50]), np.array([0.0] * 11 + [200])]
    variances, centre = [], 0.0
    for row in values:
        weights = np.r_[np.ones(len(row)), 0.25, 0.25]
        longer = np.r_[row, -200, 200]
        mean = np.average(longer, weights=weights)
        centre += mean
        variances.append(np.average((longer - mean) ** 2, weights=weights) / (len(row) + 0.5 - 1))
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 12 + variances[1] ** 2 / 11)
    t = stats.t(freedom)
    half = t.ppf(0.975) * sum(variances) ** 0.5
    found = differences.difference_of_sums_of_means(np.concatenate(values), np.repeat([0, 1], [13, 12]))
    value = 150 / 13 + 200 / 12
    same(found, value, centre - half, centre + half, 2 * t.sf(centre / sum(variances) ** 0.5))


def test_zero_difference_of_sums_has_the_exact_bound():
    found = differences.difference_of_sums_of_means(np.zeros(30), np.zeros(30, int))
    most = 200 * stats.binomtest(0, 30).proportion_ci(method="exact").high
    same(found, 0, -most, most, 1)


@pytest.mark.parametrize("images", [(20, 20, 20), (20, 30, 200), (10, 11, 12, 13)])
def test_bound_of_sums_equals_the_numerical_maximum(images):
    images = np.array(images)
    bound = differences.bound_of_sums(images)
    result = optimize.minimize(
        lambda q: -q.sum(),
        np.full(len(images), 0.01),
        bounds=[(0, 0.9)] * len(images),
        constraints={"type": "ineq", "fun": lambda q: (images * np.log1p(-q)).sum() - np.log(0.025)},
    )
    assert bound == pytest.approx(-result.fun, rel=1e-4)
    assert differences.bound_of_sums(np.array([25])) == pytest.approx(1 - 0.025 ** (1 / 25))


# --- ratios -----------------------------------------------------------------------------------------------------------


def test_difference_of_ratios_equals_a_jackknife_over_images():
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(60), rng.integers(1, 5, 60))
    runs = rng.integers(3, 11, (4, len(images))).astype(float)
    found = differences.difference_of_ratios(*runs, images)
    sums = np.array([np.bincount(images, run) for run in runs])
    left = sums.sum(axis=1, keepdims=True) - sums
    ratios = left[0] / left[1] - left[2] / left[3]
    error = np.sqrt(59 / 60 * ((ratios - ratios.mean()) ** 2).sum())
    assert found.value == pytest.approx(runs[0].sum() / runs[1].sum() - runs[2].sum() / runs[3].sum())
    assert (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, 59) * error, rel=0.03)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.value) / error, 59), rel=0.05)


def test_difference_of_ratios_to_1_equals_difference_of_shares():
    rng = np.random.default_rng(0)
    images, ones = np.repeat(np.arange(20), 5), np.ones(100)
    base, run = rng.integers(0, 2, (2, 100)).astype(float)
    found = differences.difference_of_ratios(run, ones, base, ones, images)
    shares = differences.difference_of_shares(np.bincount(images, run - base), np.full(20, 5.0))
    same(found, shares.value, shares.low, shares.high, shares.p)


def test_zero_difference_of_ratios_has_the_exact_bound():
    images = np.arange(24)
    scores, reference = np.full(24, 6.0), np.full(24, 8.0)
    most = stats.binomtest(0, 24).proportion_ci(method="exact").high * 9 / 8
    same(differences.difference_of_ratios(scores, reference, scores, reference, images), 0, -most, most, 1)
    # All differ by the same amount, so the variance is zero.
    found = differences.difference_of_ratios(scores + 1, reference, scores, reference, images)
    same(found, 1 / 8, np.nan, np.nan, np.nan)


def test_interval_and_p_value_are_nan_with_fewer_than_ten_clusters():
    rng = np.random.default_rng(0)
    scores, images = rng.integers(1, 11, (4, 18)).astype(float), np.repeat(np.arange(9), 2)
    for found in (
        differences.difference_of_shares(np.ones(9), np.arange(9.0) + 2),
        differences.difference_of_shares(np.zeros(9), np.ones(9)),
        differences.difference_of_sums_of_means(scores[0], images),
        differences.difference_of_sums_of_means(np.zeros(9), np.zeros(9, int)),
        differences.difference_of_ratios(*scores, images),
        differences.difference_of_ratios(scores[0], scores[1], scores[0], scores[1], images),
    ):
        same(found, found.value, np.nan, np.nan, np.nan)
        assert not np.isnan(found.value)


# --- items ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regressions", "improvements", "items", "low", "high", "p"),
    [
        # Fagerland, Lydersen and Laake (2014), Statistics in Medicine 33: airway reactivity, complete response.
        (7, 1, 21, -0.517, -0.026, 0.0703),
        (16, 6, 161, -0.124, -0.0054, 0.0525),
    ],
)
def test_paired_binary_difference_matches_published_examples(regressions, improvements, items, low, high, p):
    found = differences.difference_of_items(regressions, improvements, items)
    assert found.value == pytest.approx((improvements - regressions) / items)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-4)
    assert found.p == pytest.approx(p, abs=5e-5)


@pytest.mark.parametrize(("regressions", "improvements", "items"), [(7, 1, 21), (0, 4, 50), (3, 3, 30), (10, 2, 1000)])
def test_interval_ends_solve_the_score_equation(regressions, improvements, items):
    """By numerical maximum likelihood: (value - d) is 1.96 standard deviations at either end d."""
    found = differences.difference_of_items(regressions, improvements, items)
    for end in (found.low, found.high):

        def unlikely(q, d=end):
            cells = ((improvements, q + d), (regressions, q), (items - improvements - regressions, 1 - 2 * q - d))
            return -sum(n * np.log(max(p, 1e-300)) for n, p in cells if n)

        q = optimize.minimize_scalar(
            unlikely, bounds=(max(0.0, -end), (1 - end) / 2), method="bounded", options={"xatol": 1e-12}
        ).x
        deviation = ((2 * q + end - end**2) / items) ** 0.5
        assert abs(found.value - end) == pytest.approx(stats.norm.ppf(0.975) * deviation, rel=1e-3)


def test_intervals_when_no_item_or_every_item_changes():
    z2 = stats.norm.ppf(0.975) ** 2
    same(differences.difference_of_items(0, 0, 100), 0, -z2 / (100 + z2), z2 / (100 + z2), 1)
    all_lost, all_gained = (differences.difference_of_items(*n, 20) for n in ((20, 0), (0, 20)))
    assert (all_lost.low, all_gained.high) == (-1, 1)
    assert (all_lost.high, all_gained.low) == (pytest.approx(-all_gained.low), pytest.approx((20 - z2) / (20 + z2)))
    assert all_lost.p == pytest.approx(2 / 2**20)


def test_swapping_the_runs_negates_the_interval():
    there, back = differences.difference_of_items(9, 2, 80), differences.difference_of_items(2, 9, 80)
    same(back, -there.value, -there.high, -there.low, there.p)


def test_p_values_equal_those_of_statsmodels():
    for regressions, improvements in ((0, 5), (3, 12), (9, 9), (40, 21)):
        theirs = mcnemar([[5, regressions], [improvements, 9]], exact=True).pvalue
        assert differences.mcnemar(regressions, improvements) == pytest.approx(theirs)
    p_values = np.random.default_rng(0).random(12) ** 3
    assert differences.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_mcnemar():
    assert differences.mcnemar(0, 0) == 1
    assert differences.mcnemar(5, 5) == 1
    assert differences.mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert differences.mcnemar(7, 1) == differences.mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)


def test_holm_by_hand():
    # Sorted: .005 x 4, .01 x 3, then .03 x 2 = .06, and .04 x 1 isn't less.
    found = differences.holm([0.01, 0.04, 0.03, 0.005])
    assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])
    found = differences.holm([0.01, np.nan, 0.04, 0.03, np.nan, 0.005])  # NaN is not a test
    assert found == pytest.approx([0.03, np.nan, 0.06, 0.06, np.nan, 0.02], nan_ok=True)
    assert differences.holm([0.9, 0.6]) == pytest.approx([1, 1])
    assert np.isnan(differences.holm([np.nan])).all()
    assert len(differences.holm([])) == 0


def test_holm_does_not_modify_its_input():
    p_values = np.array([0.02, 0.01])
    assert differences.holm(p_values) == pytest.approx([0.02, 0.02])
    assert p_values.tolist() == [0.02, 0.01]


# --- coverage ---------------------------------------------------------------------------------------------------------


def test_simulated_coverage_of_difference_intervals():
    """A short form of scripts/coverage.py."""
    rng = np.random.default_rng(0)
    strata, images = np.repeat([0, 1, 2], [20, 30, 70]), np.repeat(np.arange(24), [2, 3] * 12)
    held = []
    for _ in range(400):
        luck = rng.random((120, 2))
        base, run = ((luck < rate).sum(axis=1) for rate in (0.7, 0.8))  # correct responses stay correct
        values = np.array([0.0, 50, 200])
        sums = differences.difference_of_sums_of_means(values[run] - values[base], strata)
        truth = 3 * (200 * (0.8**2 - 0.7**2) + 100 * (0.8 * 0.2 - 0.7 * 0.3))
        of_image = rng.integers(0, 4, 24)[images]
        scores = [rng.integers(low, 6, 60) + of_image for low in (1, 2)]
        reference = rng.integers(7, 11, (2, 60))
        ratios = differences.difference_of_ratios(scores[1], reference[1], scores[0], reference[0], images)
        both = rng.multinomial(100, (0.06, 0.02, 0.92))
        items = differences.difference_of_items(both[0], both[1], 100)
        regressions = rng.binomial(1, 0.06, (75, 8)) - rng.binomial(1, 0.02, (75, 8))
        shares = differences.difference_of_shares(regressions.sum(axis=1).astype(float), np.full(75, 8.0))
        cells = ((sums, truth), (ratios, 0.5 / 8.5), (items, -0.04), (shares, 0.04))
        held.append([found.low <= value <= found.high for found, value in cells])
    assert ((np.mean(held, axis=0) >= 0.925) & (np.mean(held, axis=0) <= 0.98)).all(), np.mean(held, axis=0)
