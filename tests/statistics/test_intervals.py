"""The confidence intervals: against exact ones, by hand, and their invariants."""

import csv
import statistics
from pathlib import Path

import numpy as np
import pytest
from satterthwaite import freedom_of
from scipy import stats
from statsmodels.regression.linear_model import WLS

from safervlm.reports.tables import with_coverage
from safervlm.results.measures import _BY_CONCEPT, _WITHIN, BY_PAIR
from safervlm.statistics import correction, differences, intervals, seeds


def test_effective_interval_is_clopper_pearson_of_the_effective_size():
    # Variance of 50 independent responses, known exactly.
    low, high = intervals.effective_interval(0.8, 0.8 * 0.2 / 50, np.inf, 10, 200, 30)
    exact = stats.binomtest(40, 50).proportion_ci(method="exact")
    assert (low, high) == (pytest.approx(exact.low), pytest.approx(exact.high))


@pytest.mark.parametrize("concepts", [1, 6])
def test_variance_within_strata_equals_hc2_of_statsmodels(concepts):
    """With one observation per cluster, CR2 is HC2 (MacKinnon and White, 1985) of the weighted regression."""
    rng = np.random.default_rng(concepts)
    strata = np.repeat(np.arange(4), [concepts + 1, 2, 5, 9])
    answers = rng.integers(5, 30, len(strata)).astype(float)
    right = rng.binomial(answers.astype(int), rng.beta(6, 2, len(strata))).astype(float)
    fitted = WLS(right / answers, np.eye(4)[strata], weights=answers).fit(cov_type="HC2")
    overall = fitted.t_test(np.bincount(strata, answers) / answers.sum())
    assert right.sum() / answers.sum() == pytest.approx(overall.effect.item())
    assert intervals.ratio_squares(right, answers, strata).sum() == pytest.approx(overall.sd.item() ** 2)


@pytest.mark.parametrize(("variance", "freedom", "size"), [(1e-9, 5, 200), (0.0, 5, 10), (1.0, 5, 10), (0.01, 0, 10)])
def test_effective_size_stays_within_its_bounds(variance, freedom, size):
    exact = stats.binomtest(round(0.8 * size), size).proportion_ci(method="exact")
    low, high = intervals.effective_interval(0.8, variance, freedom, 10, 200, 30)
    assert (low, high) == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_effective_size_shrinks_with_the_degrees_of_freedom():
    size = 50 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 6)) ** 2
    low, high = intervals.effective_interval(0.8, 0.8 * 0.2 / 50, 6, 10, 200, 30)
    assert low == pytest.approx(stats.beta.ppf(0.025, 0.8 * size, 0.2 * size + 1))
    assert high == pytest.approx(stats.beta.ppf(0.975, 0.8 * size + 1, 0.2 * size))


def caught(monkeypatch):
    """The arguments of `effective_interval`: share, variance, degrees of freedom, least, most, size at the edge."""
    calls = []
    monkeypatch.setattr(intervals, "effective_interval", lambda *values: calls.append(values) or (0.0, 1.0))
    return calls


def test_variance_for_fixed_concepts_matches_hand_calculation(monkeypatch):
    calls = caught(monkeypatch)
    # Concept 0: images (4/5, 2/5); 1: (5/5, 5/5, 2/4); 2 and 3 have a single image each: (0/5), (3/5).
    right = np.array([4, 2, 5, 5, 2, 0, 3.0])
    answers = np.array([5, 5, 5, 5, 4, 5, 5.0])
    concepts = np.array([0, 0, 1, 1, 1, 2, 3])
    intervals.interval_these_concepts(right, answers, concepts)
    p = 21 / 34
    squares = []
    for stratum in ([0, 1], [2, 3, 4], [5, 6]):
        z = [(right[i] - p * answers[i]) / 34 for i in stratum]
        squares += [len(z) / (len(z) - 1) * (x - sum(z) / len(z)) ** 2 for x in z]
    freedom = 2 * sum(squares) ** 2 / sum(x**2 for x in squares) - 1
    assert freedom > 1 + 2 + 1  # what the strata leave, then
    edge = 34 / (1 + ((6 * 25 + 16) / 34 - 1) / 2)
    assert calls == [pytest.approx((p, sum(squares), 1 + 2 + 1, 34**2 / (6 * 25 + 16), 2 * 34, edge))]


def test_degrees_of_freedom_are_few_when_one_image_has_all_errors(monkeypatch):
    calls = caught(monkeypatch)
    right, concepts = np.ones(20), np.arange(20) // 10
    right[0] = 0
    intervals.interval_these_concepts(right, np.ones(20), concepts)
    # Its distance from its concept's mean .9 is 9 times that of its nine neighbours.
    squares = np.array([0.9**2] + [0.1**2] * 9)
    freedom = 2 * squares.sum() ** 2 / (squares**2).sum() - 1
    assert freedom < 2
    assert calls == [pytest.approx((0.95, 10 / 9 * squares.sum() / 400, freedom, 20, 40, 20))]


def test_fixed_concept_interval_is_shorter_than_binomial_when_concepts_differ():
    right = np.r_[np.ones(40), np.zeros(40), np.arange(20) % 2]
    low, high = intervals.interval_these_concepts(right, np.ones(100), np.repeat(np.arange(5), 20))
    independent = stats.binomtest(50, 100).proportion_ci(method="exact")
    at_most = stats.binomtest(100, 200).proportion_ci(method="exact")  # twice the responses
    assert high - low < independent.high - independent.low
    assert (low, high) == (pytest.approx(at_most.low), pytest.approx(at_most.high))


def test_variance_of_a_single_image_stratum_uses_the_overall_mean(monkeypatch):
    calls = caught(monkeypatch)
    intervals.interval_these_concepts(np.array([1, 0, 1.0]), np.ones(3), np.array([0, 0, 1]))
    # 2 / (2 - 1) * ((1/6)^2 + (1/6)^2) within concept 0, ((1 - 2/3) / 3)^2 of the single.
    assert calls == [pytest.approx((2 / 3, 2 * 2 / 36 + 1 / 81, 1, 3, 6, 3))]


def test_variance_of_new_concepts_is_cr2(monkeypatch):
    calls = caught(monkeypatch)
    rng = np.random.default_rng(0)
    answers = rng.integers(1, 30, 12).astype(float)
    right = rng.binomial(answers.astype(int), 0.7).astype(float)
    intervals.interval_new_concepts(right, answers)
    # By matrices, as in Bell and McCaffrey: A_g = (I - H_gg)^(-1/2) for the regression on a constant.
    total = answers.sum()
    share = right.sum() / total
    squares = []
    for r, n in zip(right.astype(int), answers.astype(int), strict=True):
        residual = np.r_[np.ones(r), np.zeros(n - r)] - share
        values, vectors = np.linalg.eigh(np.eye(n) - np.ones((n, n)) / total)
        squares.append((np.ones(n) @ (vectors * values**-0.5) @ vectors.T @ residual / total) ** 2)
    freedom = freedom_of(squares)
    least, edge = total**2 / (answers**2).sum(), total / (1 + ((answers**2).sum() / total - 1) / 2)
    assert calls == [pytest.approx((share, sum(squares), freedom, least, total, edge))]


def test_new_concepts_need_ten():
    assert intervals.interval_new_concepts(np.ones(9), np.full(9, 2.0)) is None
    assert intervals.interval_new_concepts(np.ones(10), np.full(10, 2.0)) is not None


def test_interval_has_positive_width_when_all_responses_are_correct():
    low, high = intervals.interval_these_concepts(np.full(8, 5.0), np.full(8, 5.0), np.arange(8) // 2)
    # Five responses to an image are correlated by .5, so they count as 5 / 3: neither one nor five.
    assert (low, high) == (pytest.approx(0.025 ** (3 / 40)), 1.0)
    interval = intervals.interval_new_concepts(np.full(12, 20.0), np.full(12, 20.0))
    assert interval == (pytest.approx(0.025 ** (10.5 / 240)), 1.0)
    low, high = intervals.interval_these_concepts(np.zeros(1), np.full(1, 5.0), np.zeros(1, int))
    assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (3 / 5)))
    # Concepts of unequal size, as in the pictograms: 104 responses about 26 concepts.
    sizes = np.r_[np.full(8, 10.0), np.full(6, 2.0), np.full(12, 1.0)]
    low, _ = intervals.interval_new_concepts(sizes, sizes)
    mean = (sizes**2).sum() / 104
    assert low == pytest.approx(0.025 ** ((1 + (mean - 1) / 2) / 104))


def test_error_rate_of_the_bound_at_1_for_fully_correlated_responses():
    """If the responses of a concept are always alike, 26 concepts of 4 images exceed the bound in 10 %, not 2.5 %."""
    bound, _ = intervals.interval_new_concepts(np.full(26, 4.0), np.full(26, 4.0))
    assert bound**26 == pytest.approx(0.10, abs=0.005)


def test_one_image_per_concept_gives_clopper_pearson():
    # All strata are single: the variance is a collapsed one, at most the binomial one for independent images.
    right = np.array([1, 1, 1, 0, 1, 1, 1, 1.0])
    exact = stats.binomtest(7, 8).proportion_ci(method="exact")
    interval = intervals.interval_these_concepts(right, np.ones(8), np.arange(8))
    assert interval == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_effective_freedom_counts_the_concepts_that_carry_the_variance():
    assert intervals.effective_freedom(np.array([1.0, 0.0, 0.0, 0.0])) == 1
    assert intervals.effective_freedom(np.array([1.0, 1.0] + [0.0] * 8)) == 2 * 2 - 1
    assert intervals.effective_freedom(np.array([3.0, 1.0] + [0.0] * 8)) == pytest.approx(2 * 16 / 10 - 1)
    assert intervals.effective_freedom(np.ones(8)) == 7
    assert intervals.effective_freedom(np.ones(8), 5) == 5
    assert intervals.effective_freedom(np.zeros(8)) == 7


def test_a_cluster_that_deviates_alone_has_one_degree_of_freedom():
    for sizes in ([2, 5, 9], [75], [3, 3]):
        strata = np.repeat(np.arange(len(sizes)), sizes)
        values = np.zeros(len(strata))
        values[-1] = 1.0
        squares = intervals.ratio_squares(values, np.ones(len(values)), strata)
        assert intervals.freedom_within(squares, strata) == pytest.approx(1.0)
    even = np.tile([1.0, -1.0], 30)
    assert intervals.freedom_within(even**2, np.repeat(np.arange(3), 20)) == 57  # clusters less strata
    assert intervals.freedom_within(np.zeros(6), np.repeat([0, 1], 3)) == 4


@pytest.mark.parametrize(("large", "number"), [(1, 3000), (2, 3000 * (1 + 4) ** 2 / (1 + 16) / 2)])
def test_effective_degrees_of_freedom_are_two_thirds_of_satterthwaite(large, number):
    deviations = np.repeat([1, large], 1500)
    squares = (deviations * np.random.default_rng(0).standard_normal((50, 3000))) ** 2
    freedom = np.mean([intervals.effective_freedom(row) for row in squares])
    assert freedom == pytest.approx(number * 2 / 3, rel=0.02)


def test_paired_interval():
    rng = np.random.default_rng(1)
    differences = np.r_[0.3 + 0.1, 0.3 - 0.1].repeat(6)  # all squares equal: Student's degrees of freedom
    low, high = intervals.interval_paired(differences)
    theirs = stats.ttest_1samp(differences, 0).confidence_interval()
    assert (low, high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    differences = np.r_[np.zeros(18), 0.9, 0.8]  # two concepts contribute all of it
    low, high = intervals.interval_paired(differences)
    theirs = stats.ttest_1samp(differences, 0).confidence_interval()
    half = stats.t.ppf(0.975, freedom_of((differences - differences.mean()) ** 2)) * stats.sem(differences)
    assert (low, high) == (pytest.approx(differences.mean() - half), pytest.approx(differences.mean() + half))
    assert high - low > 1.2 * (theirs.high - theirs.low)
    assert intervals.interval_paired(rng.random(9)) is None
    assert intervals.interval_paired(np.full(20, 0.5)) is None
    assert intervals.interval_paired(np.r_[np.ones(11), -1.0])[1] == 1.0


# --- ratios -----------------------------------------------------------------------------------------------------------


def llava(rng, images=24):
    clusters = np.repeat(np.arange(images), rng.integers(1, 5, images))
    reference = rng.integers(6, 11, len(clusters)).astype(float)
    return np.minimum(reference, rng.integers(1, 11, len(clusters))).astype(float), reference, clusters


def test_interval_of_a_ratio_is_cr2_by_matrices():
    scores, reference, clusters = llava(np.random.default_rng(0))
    low, high = intervals.interval_ratio(scores, reference, clusters)
    # A ratio of sums is the slope of y / sqrt(x) on sqrt(x), by least squares.
    x, y = np.sqrt(reference), scores / np.sqrt(reference)
    slope = x @ y / (x @ x)
    squares = []
    for image in range(24):
        of = clusters == image
        values, vectors = np.linalg.eigh(np.eye(of.sum()) - np.outer(x[of], x[of]) / (x @ x))
        adjusted = (vectors * values**-0.5) @ vectors.T @ (y - slope * x)[of]
        squares.append((x[of] @ adjusted / (x @ x)) ** 2)
    freedom = freedom_of(squares)
    half = stats.t.ppf(0.975, freedom) * sum(squares) ** 0.5
    assert slope == pytest.approx(scores.sum() / reference.sum())
    assert (low, high) == (pytest.approx(slope - half), pytest.approx(slope + half))


def test_interval_of_a_ratio_agrees_with_the_bootstrap():
    scores, reference, clusters = llava(np.random.default_rng(1), images=60)
    low, high = intervals.interval_ratio(scores, reference, clusters)
    above, below = np.bincount(clusters, scores), np.bincount(clusters, reference)
    drawn = np.random.default_rng(2).integers(0, 60, (4000, 60))
    deviation = (above[drawn].sum(axis=1) / below[drawn].sum(axis=1)).std()
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 59) * deviation, rel=0.08)


def test_ratio_has_no_interval_with_fewer_than_ten_images_or_no_variance():
    scores, reference, clusters = llava(np.random.default_rng(0), images=9)
    assert intervals.interval_ratio(scores, reference, clusters) is None
    assert intervals.interval_ratio(scores[:1], reference[:1], np.zeros(1, int)) is None
    assert intervals.interval_ratio(np.full(20, 5.0), np.full(20, 10.0), np.arange(20)) is None


# --- sums of means ----------------------------------------------------------------------------------------------------

TASKS = (30, 30, 30, 30, 147, 170, 200, 200, 200, 20, 70, 20, 20, 20)


def test_interval_of_a_sum_over_two_tasks_matches_hand_calculation():
    """k = 2: one added image at each end, so the plain variance of the longer lists."""
    values = [[200.0] * 8 + [50.0, 0.0, 50.0], [50.0] * 9 + [0.0]]
    low, high = intervals.interval_sum_of_means(np.concatenate(values), np.repeat([0, 1], [11, 10]))
    longer = [[*row, 0.0, 200.0] for row in values]
    variances = [statistics.variance(row) / len(row) for row in longer]
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 10 + variances[1] ** 2 / 9)
    centre = sum(map(statistics.mean, longer))
    half = stats.t.ppf(0.975, freedom) * sum(variances) ** 0.5
    assert (low, high) == (pytest.approx(centre - half), pytest.approx(centre + half))


def test_interval_of_a_perfect_sum_of_task_scores_has_positive_width():
    strata = np.repeat(np.arange(14), TASKS)
    low, high = intervals.interval_sum_of_means(np.full(len(strata), 200.0), strata)
    exact = 200 * differences.bound_of_sums(np.array(TASKS))  # the bound without any wrong image
    assert high == 2800
    assert 0.7 * exact < 2800 - low < exact
    assert intervals.interval_sum_of_means(np.zeros(len(strata)), strata) == (0, pytest.approx(2800 - low))
    # The variance of the other strata is not the whole variance.
    values = np.where(strata == 9, 200.0, np.random.default_rng(0).choice([0.0, 50, 200], len(strata)))
    low, high = intervals.interval_sum_of_means(values, strata)
    spread = sum(values[strata == task].var(ddof=1) / n for task, n in enumerate(TASKS))
    assert high - low > 2 * 1.96 * spread**0.5


def test_interval_of_one_task_equals_wilsons_interval():
    values = np.r_[np.zeros(3), np.full(5, 50.0), np.full(22, 200.0)]
    low, high = intervals.interval_sum_of_means(values, np.zeros(30, int))
    share = values.mean() / 200
    size = share * (1 - share) / (statistics.variance(values / 200) / 30) * (1.959964 / stats.t.ppf(0.975, 29)) ** 2
    for end in (low / 200, high / 200):  # Wilson's: 1.96 standard deviations from the share
        assert abs(share - end) == pytest.approx(1.959964 * (end * (1 - end) / size) ** 0.5, rel=1e-5)
    assert low < values.mean() < high
    wilson = stats.binomtest(20, 20).proportion_ci(method="wilson")
    assert intervals.interval_sum_of_means(np.full(20, 200.0), np.zeros(20, int)) == (
        pytest.approx(200 * wilson.low),
        200.0,
    )
    rare = np.r_[np.full(29, 50.0), 0.0]  # 200 may not have been sampled by chance: no more information than 120 images
    wilson = stats.binomtest(29, 120).proportion_ci(method="wilson")
    assert intervals.interval_sum_of_means(rare, np.zeros(30, int)) == (
        pytest.approx(200 * wilson.low),
        pytest.approx(200 * wilson.high),
    )
    wilson = stats.binomtest(5, 20).proportion_ci(method="wilson")  # as if all values were 0 or 200
    assert intervals.interval_sum_of_means(np.full(20, 50.0), np.zeros(20, int)) == (
        pytest.approx(200 * wilson.low),
        pytest.approx(200 * wilson.high),
    )


def test_interval_of_a_sum_scales_with_the_bounds_of_its_values():
    rng = np.random.default_rng(0)
    for strata in (np.zeros(20, int), np.repeat([0, 1, 2], 20)):
        values = rng.choice([0.0, 50, 200], len(strata))
        low, high = intervals.interval_sum_of_means(values, strata)
        tasks = strata.max() + 1
        shifted = intervals.interval_sum_of_means(values / 100 - 1, strata, -1.0, 1.0)
        assert shifted == (pytest.approx(low / 100 - tasks), pytest.approx(high / 100 - tasks))


def test_a_sum_needs_ten_images_a_task():
    values = np.arange(20) % 3 * 50.0
    assert intervals.interval_sum_of_means(values, np.repeat([0, 1], [11, 9])) is None
    assert intervals.interval_sum_of_means(values, np.repeat([0, 1], [10, 10])) is not None


# --- coverage ---------------------------------------------------------------------------------------------------------


def test_the_simulated_coverage_of_every_method_is_known():
    methods = [
        _WITHIN.format("images"),
        _WITHIN.format("answers"),
        _BY_CONCEPT,
        BY_PAIR,
        intervals.BY_TASK,
        intervals.BY_IMAGE,
        intervals.RATIO_BY_IMAGE,
        differences.SHARES_BY_CONCEPT,
        differences.SHARES_BY_IMAGE,
        differences.SHARES_BY_ITEM,
        differences.SUMS_BY_TASK,
        differences.RATIOS_BY_IMAGE,
    ]
    for method in methods:
        lowest, highest = map(float, intervals.coverage(method).split(" to "))
        assert 0.93 <= lowest < highest <= 1, method  # too short an interval is never printed
    assert intervals.coverage("guess") is None
    assert intervals.coverage(methods[0], "guess") is None


def test_reported_coverage_range_is_rounded_outward(monkeypatch):
    rows = (("a", "overall", 0.941, 0.972), ("a", "category", 0.95, 0.998), ("b", "overall", 0.94, 0.97))
    monkeypatch.setattr(intervals, "_coverage", lambda: rows)
    assert intervals.coverage("a", "overall") == ".94 to .98"
    assert intervals.coverage("a") == ".94 to 1.00"
    assert intervals.coverage("b") == ".94 to .97"


def test_coverage_for_skewed_concepts_is_reported_separately(monkeypatch):
    rows = (("a", "overall", 0.94, 0.97), ("a", intervals.SKEWED, 0.86, 0.97))
    monkeypatch.setattr(intervals, "_coverage", lambda: rows)
    assert intervals.coverage("a") == ".94 to .97"
    assert intervals.coverage("a", intervals.SKEWED) == ".86 to .97"
    assert with_coverage("a") == "a; simulated coverage .94 to .97, .86 to .97 if few concepts make the errors"


def test_documented_coverages_equal_the_packaged_table():
    root = Path(__file__).parent.parent.parent
    with (root / "safervlm" / "coverage.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    lines = (root / "docs" / "intervals.md").read_text(encoding="utf-8").splitlines()
    shown = lines[lines.index("| " + " | ".join(rows[0]) + " |") + 2 :][: len(rows) - 1]
    assert shown == ["| " + " | ".join(row) + " |" for row in rows[1:]]


def test_documented_coverages_over_seeds_equal_the_packaged_table():
    """Columns of the table: mean, SD, seeds, coverage over seeds, of the first run, share of groups that differ, ..."""
    page = (Path(__file__).parent.parent.parent / "docs" / "intervals.md").read_text(encoding="utf-8")
    table = page[page.index("<!-- seeds -->") : page.index("<!-- end of seeds -->")]
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and line[2].isdigit()]
    over = [float(row[3].split()[0]) for row in cells]
    equal = [1 - float(row[5]) for row in cells]
    for part, found in ((seeds.MEAN, over), (seeds.DIFFERENCE, equal)):
        row = next(row for row in intervals._coverage() if row[:2] == (seeds.OVER_SEEDS, part))
        assert row[2:] == pytest.approx((min(found), max(found)))


def test_docs_and_package_hold_the_same_coverages_of_corrected_rates():
    """Columns of the table: judge, accuracy, rate, labels, coverage for this run, its width, for new concepts, ..."""
    page = (Path(__file__).parent.parent.parent / "docs" / "intervals.md").read_text(encoding="utf-8")
    table = page[page.index("<!-- labels -->") : page.index("<!-- end of labels -->")]
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith(("| calibrated", "| overconfident"))]
    assert len(cells) == 56
    for part, column in ((correction.OF_THIS_RUN, 4), (correction.OF_NEW_CONCEPTS, 6)):
        found = [float(row[column].split()[0]) for row in cells]
        row = next(row for row in intervals._coverage() if row[:2] == (correction.BY_LABELS, part))
        assert row[2:] == (min(found), max(found))


@pytest.mark.parametrize("accuracy", [0.5, 0.97])
def test_coverage_of_sums_and_ratios(accuracy):
    """A short form of scripts/coverage.py: MME's total, LLaVABench."""
    rng = np.random.default_rng(0)
    strata = np.repeat(np.arange(14), TASKS)
    images = np.repeat(np.arange(24), [2, 3] * 12)
    held = []
    for _ in range(400):
        values = np.array([0.0, 50, 200])[rng.binomial(2, accuracy, len(strata))]
        low, high = intervals.interval_sum_of_means(values, strata)
        of_image = rng.integers(0, 4, 24)[images]
        scores, reference = rng.integers(1, 6, 60) + of_image, rng.integers(7, 11, 60)
        below, above = intervals.interval_ratio(scores.astype(float), reference.astype(float), images)
        truth = 14 * (200 * accuracy**2 + 100 * accuracy * (1 - accuracy))
        held.append((low <= truth <= high, below <= 4.5 / 8.5 <= above))
    assert ((np.mean(held, axis=0) >= 0.925) & (np.mean(held, axis=0) <= 0.985)).all(), np.mean(held, axis=0)


@pytest.mark.parametrize("rate", [0.5, 0.97])
def test_simulated_coverage_with_uneven_correlated_concepts(rate):
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


def test_new_concepts_of_two_kinds_are_sampled_within_each():
    """The difference between unsafe and safe concepts is not part of the variance between concepts."""
    rng = np.random.default_rng(0)
    answers, strata = np.full(40, 5.0), np.repeat([0, 1], 20)
    right = rng.binomial(5, np.where(strata == 0, 0.3, 0.9)).astype(float)
    squares = intervals.ratio_squares(right, answers, strata)
    by_hand = [
        ((right[i] - right[strata == s].mean()) ** 2 / (1 - 1 / 20) / 200**2)
        for s in (0, 1)
        for i in np.flatnonzero(strata == s)
    ]
    assert squares == pytest.approx(np.array(by_hand))
    low, high = intervals.interval_new_concepts(right, answers, strata)
    shares = [right[strata == s].sum() / 100 for s in (0, 1)]
    each = [intervals.interval_new_concepts(right[strata == s], answers[strata == s]) for s in (0, 1)]
    below, above = (
        sum((end - share) ** 2 for end, share in zip(ends, shares, strict=True)) ** 0.5 / 2
        for ends in zip(*each, strict=True)
    )
    assert (low, high) == pytest.approx((sum(shares) / 2 - below, sum(shares) / 2 + above))
    all_low, all_high = intervals.interval_new_concepts(right, answers)
    assert high - low < 0.65 * (all_high - all_low)
    # A single kind equals the unstratified interval; a kind with a single concept adds nothing.
    one = np.zeros(20, int)
    assert intervals.interval_new_concepts(right[:20], answers[:20], one) == pytest.approx(
        intervals.interval_new_concepts(right[:20], answers[:20])
    )
    assert intervals.ratio_squares(right[:21], answers[:21], np.r_[one, 1])[20] == 0
    assert intervals.interval_new_concepts(right[:29], answers[:29], strata[:29]) is None  # nine of the other kind


def test_strata_are_the_categories_of_each_dataset():
    datasets = np.array(["UC"] * 8 + ["safe"] * 3)
    categories = np.array(
        ["Hate", "Hate", "Hate", "Sexual", "Sexual", "Deception", "Violence", "Shocking"] + ["safe"] * 3
    )
    strata = intervals.strata_of(datasets, categories)
    # Those of a single concept are one stratum.
    groups = {frozenset(np.flatnonzero(strata == stratum)) for stratum in set(strata)}
    assert groups == {frozenset({0, 1, 2}), frozenset({3, 4}), frozenset({5, 6, 7}), frozenset({8, 9, 10})}
    assert sorted(set(strata)) == [0, 1, 2, 3]
    # One alone joins the smallest other category.
    strata = intervals.strata_of(datasets[:6], categories[:6])
    groups = {frozenset(np.flatnonzero(strata == stratum)) for stratum in set(strata)}
    assert groups == {frozenset({0, 1, 2}), frozenset({3, 4, 5})}
    # Nothing is pooled across datasets, and a dataset's only concept stays alone.
    assert len(set(intervals.strata_of(np.array(["a", "b", "b", "b"]), np.array(["x", "x", "y", "z"])))) == 2
    assert intervals.strata_of(np.array(["a"]), np.array(["x"])).tolist() == [0]
    assert intervals.strata_of(np.array([], int), np.array([], int)).tolist() == []


def test_the_variance_within_categories_is_cr2_of_a_regression_on_them(monkeypatch):
    calls = caught(monkeypatch)
    rng = np.random.default_rng(3)
    categories = np.repeat([0, 1, 2], [3, 5, 6])
    answers = rng.integers(1, 12, 14).astype(float)
    right = rng.binomial(answers.astype(int), np.array([0.2, 0.5, 0.9])[categories]).astype(float)
    intervals.interval_new_concepts(right, answers, categories=categories)
    # One row per response, one dummy variable per category; the share is a contrast of the coefficients.
    concept = np.repeat(np.arange(14), answers.astype(int))
    outcome = np.concatenate(
        [np.r_[np.ones(int(r)), np.zeros(int(n - r))] for r, n in zip(right, answers, strict=True)]
    )
    design = np.eye(3)[categories[concept]]
    bread = np.linalg.inv(design.T @ design)
    residual = outcome - design @ bread @ design.T @ outcome
    contrast = design.sum(axis=0) / len(outcome)
    squares = []
    for number in range(14):
        rows = design[concept == number]
        values, vectors = np.linalg.eigh(np.eye(len(rows)) - rows @ bread @ rows.T)
        adjusted = (vectors * values**-0.5) @ vectors.T @ residual[concept == number]
        squares.append((contrast @ bread @ rows.T @ adjusted) ** 2)
    assert calls[0][1] == pytest.approx(sum(squares))
    assert calls[0][2] == pytest.approx(freedom_of(squares, categories))


def test_categories_shorten_an_interval_only_where_they_differ():
    rng = np.random.default_rng(0)
    categories, answers = np.repeat(np.arange(9), 8), np.full(72, 5.0)
    between = rng.binomial(5, np.linspace(0.1, 0.9, 9)[categories]).astype(float)
    (low, high), (plain_low, plain_high) = (
        intervals.interval_new_concepts(between, answers, categories=groups) for groups in (categories, None)
    )
    assert high - low < 0.7 * (plain_high - plain_low)
    alike = rng.binomial(5, rng.beta(2, 2, 72)).astype(float)
    (low, high), (plain_low, plain_high) = (
        intervals.interval_new_concepts(alike, answers, categories=groups) for groups in (categories, None)
    )
    assert high - low == pytest.approx(plain_high - plain_low, rel=0.1)
    gaps = np.linspace(0, 0.8, 9)[categories] + rng.normal(0, 0.05, 72)
    (low, high), (plain_low, plain_high) = (intervals.interval_paired(gaps, groups) for groups in (categories, None))
    assert high - low < 0.4 * (plain_high - plain_low)
    assert intervals.interval_paired(np.linspace(0, 0.8, 9)[categories], categories) is None  # no spread within any


def test_interval_over_safe_and_unsafe_concepts_contains_the_true_value():
    rng = np.random.default_rng(1)
    strata = np.repeat([0, 1], [30, 60])
    answers = np.where(strata == 0, 5.0, 2.0)
    truth = (0.1 * 150 + 0.95 * 120) / 270
    held = []
    for _ in range(400):
        by_concept = rng.beta(*np.where(strata == 0, [[0.9], [8.1]], [[8.55], [0.45]]))
        right = rng.binomial(answers.astype(int), by_concept).astype(float)
        low, high = intervals.interval_new_concepts(right, answers, strata)
        held.append(low <= truth <= high)
    assert 0.92 <= np.mean(held) <= 0.99
