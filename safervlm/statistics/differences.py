"""Paired differences between two runs on the same questions: 95 % intervals, p-values, and Holm's correction.

Simulated coverage of the intervals: ``scripts/coverage.py``, docs/intervals.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaincinv, stdtr
from scipy.stats import binomtest

from safervlm.statistics.intervals import (
    FEWEST_CONCEPTS,
    NORMAL,
    Floats,
    Numbers,
    effective_clusters,
    freedom_within,
    ratio_squares,
    smoothed_sum,
    t_interval,
)

# Names of interval methods, for table captions; ``intervals.coverage`` looks them up.
SHARES_BY_CONCEPT = "paired t, concepts within categories (CR2)"
SHARES_BY_IMAGE = "paired t, images"
SHARES_BY_ITEM = "Tango, items; p: McNemar, exact"
SUMS_BY_TASK = "paired stratified t, images within tasks"
RATIOS_BY_IMAGE = "paired t, images (CR2)"


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between two runs, with its interval and p-value.

    Attributes:
        value: This run's number minus the other run's.
        low: Lower end of the 95 % interval; NaN if there is none.
        high: Upper end of the 95 % interval; NaN if there is none.
        p: Two-sided p-value of no difference; NaN if it can't be computed.
    """

    value: float
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan


def difference_of_shares(differences: Floats, answers: Floats, strata: Numbers | None = None) -> Difference:
    """Computes the difference of two shares, ``sum(differences) / sum(answers)``, over new clusters.

    Clusters are concepts or images. The interval is Student's t, with the CR2 variance and the degrees of freedom of
    :func:`~safervlm.statistics.intervals.freedom_within`. It is limited to plus and minus the upper bound of the
    share of clusters that differ at all (Clopper and Pearson 1934, Biometrika 26), which is also valid if none differs.
    If all clusters differ by the same amount, the share of clusters that do not is bounded in the same way, and those
    may differ by any amount.

    Args:
        differences: (clusters,) right responses of the one run minus those of the other.
        answers: (clusters,) number of responses of each run about each cluster, at least 1.
        strata: (clusters,) the stratum of each, from :func:`~safervlm.statistics.intervals.strata_of`: new clusters are
            sampled from the same strata. None is a single stratum.

    Returns:
        The difference; without interval and p-value for fewer than 10 clusters.
    """
    value = float(differences.sum() / answers.sum())
    if len(answers) < FEWEST_CONCEPTS:
        return Difference(value)
    clusters = effective_clusters(answers)
    squares = ratio_squares(differences, answers, strata)
    if squares.sum() < 1e-15:
        other = upper_bound_of_differing(0.0, clusters)
        p = min(2 * (1 + abs(value)) ** -clusters, 1.0)  # the level at which an end of the interval is 0
        return Difference(value, value - other * (1 + value), value + other * (1 - value), p)
    freedom = freedom_within(squares, strata)
    low, high = t_interval(value, squares.sum(), freedom)
    most = upper_bound_of_differing(float(answers[differences != 0].sum() / answers.sum()), clusters)
    return Difference(value, max(low, -most), min(high, most), p_value(value, squares.sum(), freedom))


def difference_of_sums_of_means(differences: Floats, strata: Numbers, span: float = 200.0) -> Difference:
    """Computes the difference of two sums over strata of means, paired by image, over new images of the same strata.

    The interval is the stratified t of :func:`~safervlm.statistics.intervals.interval_sum_of_means`, with 1/(2k)
    pseudo-images that change from the greatest to the least value, and as many that change the other way, added to each
    of k strata. That is half of what Bonett and Price add to a stratum of changes between wrong and right (2012,
    Adjusted Wald confidence interval for a difference of binomial proportions based on paired data, Journal of
    Educational and Behavioral Statistics 37), because few images change by the full amount. If no image differs, the
    interval is the exact bound of :func:`bound_of_sums`.

    Args:
        differences: (images,) the value of each image in the one run minus that in the other.
        strata: (images,) the stratum (task) of each, as a number from 0 without gaps.
        span: The largest possible difference of an image, in the unit of ``differences``.

    Returns:
        The difference; without interval and p-value if a stratum has fewer than 10 images.
    """
    images = np.bincount(strata)
    value = float((np.bincount(strata, differences) / images).sum())
    if images.min() < FEWEST_CONCEPTS:
        return Difference(value)
    if not differences.any():
        most = span * bound_of_sums(images)
        return Difference(0.0, -most, most, 1.0)
    centre, variance, freedom = smoothed_sum(differences, strata, -span, span, 0.5 / len(images))
    low, high = t_interval(centre, variance, freedom)
    most = span * len(images)
    low, high = max(min(low, value), -most), min(max(high, value), most)
    return Difference(value, low, high, p_value(centre, variance, freedom))


def difference_of_ratios(
    numerators: Floats,
    denominators: Floats,
    base_numerators: Floats,
    base_denominators: Floats,
    clusters: Numbers,
    span: float = 9.0,
) -> Difference:
    """Computes the difference of two ratios of sums over the same questions, over new clusters (images).

    Both ratios are linearised, and their residuals are subtracted within each cluster; degrees of freedom as in
    :func:`difference_of_shares`. If no question differs, the interval is the change of the ratio if the largest
    plausible share of clusters (:func:`upper_bound_of_differing`) differed by the whole span.

    Args:
        numerators: (questions,) for example the model's ratings.
        denominators: (questions,) for example the reference's ratings, positive.
        base_numerators: (questions,) the numerators of the base run.
        base_denominators: (questions,) the denominators of the base run.
        clusters: (questions,) the cluster of each, for example its image, as a number from 0 without gaps.
        span: The largest possible difference of two ratings.

    Returns:
        The difference; without interval and p-value for fewer than 10 clusters, or if the variance is 0 although
        questions differ.
    """
    questions = (numerators, denominators, base_numerators, base_denominators)
    above, below, base_above, base_below = (np.bincount(clusters, x).astype(np.float64) for x in questions)
    ratio, base_ratio = above.sum() / below.sum(), base_above.sum() / base_below.sum()
    value = float(ratio - base_ratio)
    if len(below) < FEWEST_CONCEPTS:
        return Difference(value)
    residuals = (above - ratio * below) / below.sum() - (base_above - base_ratio * base_below) / base_below.sum()
    squares = residuals**2 / (1 - (below / below.sum() + base_below / base_below.sum()) / 2)
    if np.array_equal(numerators, base_numerators) and np.array_equal(denominators, base_denominators):
        most = upper_bound_of_differing(0.0, effective_clusters(below)) * span / float(denominators.mean())
        return Difference(0.0, -most, most, 1.0)
    if squares.sum() < 1e-15:
        return Difference(value)
    freedom = freedom_within(squares)
    return Difference(value, *t_interval(value, squares.sum(), freedom), p_value(value, squares.sum(), freedom))


def difference_of_items(regressions: int, improvements: int, items: int) -> Difference:
    """Computes the difference of two shares of the same independent items, ``(improvements - regressions) / items``.

    The interval is Tango's score interval (1998, Equivalence test and confidence interval for the difference in
    proportions for the paired-sample design, Statistics in Medicine 17), which is also valid if no item differs. The
    p-value is McNemar's.

    Args:
        regressions: Number of items that only the other run has right.
        improvements: Number of items that only this run has right.
        items: Number of all items, at least one.

    Returns:
        The difference, with its interval and p-value.
    """
    value = (improvements - regressions) / items

    def score(difference: float) -> float:
        """Score statistic of a difference; it decreases, and equals +-1.96 at the interval's ends."""
        if abs(difference - value) < 1e-12:
            return 0.0  # also where the variance is 0
        # Maximum likelihood share q of regressions given the difference: the larger root of 2 n q^2 + b q + c.
        b = (2 * items - improvements + regressions) * difference - improvements - regressions
        c = -regressions * difference * (1 - difference)
        q = (np.sqrt(b * b - 8 * items * c) - b) / (4 * items)
        return float(
            (improvements - regressions - items * difference) / np.sqrt(items * (2 * q + difference * (1 - difference)))
        )

    edge = 1 - 1e-9  # the variance is 0 at 1
    low = brentq(lambda x: score(x) - NORMAL, -edge, value) if regressions < items else -1.0
    high = brentq(lambda x: score(x) + NORMAL, value, edge) if improvements < items else 1.0
    return Difference(value, float(low), float(high), mcnemar(regressions, improvements))


def mcnemar(regressions: int, improvements: int) -> float:
    """Returns the exact two-sided p-value of McNemar's test (1947, Psychometrika 12).

    The null hypothesis is that an item changes from right to wrong with the same probability as from wrong to right.

    Args:
        regressions: Number of items that changed from right to wrong.
        improvements: Number of items that changed from wrong to right.
    """
    return float(binomtest(regressions, regressions + improvements).pvalue) if regressions + improvements else 1.0


def holm(p_values: Sequence[float] | Floats) -> Floats:
    """Holm's adjusted p-values (1979, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6).

    Args:
        p_values: (tests,); NaN stays NaN and is not counted as a test.

    Returns:
        (tests,) adjusted p-values. If all differences below .05 are claimed, the probability of any false claim
        (family-wise error rate) is at most 5 %.
    """
    adjusted = np.array(p_values, np.float64)
    tests = np.flatnonzero(~np.isnan(adjusted))
    order = tests[np.argsort(adjusted[tests], kind="stable")]
    raised = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted


def p_value(value: float, variance: float, freedom: float) -> float:
    """Returns Student's two-sided p-value of no difference; it is below .05 exactly if the 95 % t interval excludes 0.

    Args:
        value: The estimated difference.
        variance: The estimated variance of ``value``, positive.
        freedom: The degrees of freedom of ``variance``.
    """
    return float(2 * stdtr(freedom, -abs(value) / np.sqrt(variance)))


def upper_bound_of_differing(share: float, clusters: float) -> float:
    """Upper end of Clopper and Pearson's 95 % interval for the share of clusters that differ, also if none does.

    Args:
        share: The observed share of clusters that differ, 0 to 1.
        clusters: Number of clusters; may be an effective number.

    Returns:
        The bound, a share from 0 to 1.
    """
    return float(betaincinv(share * clusters + 1, (1 - share) * clusters, 0.975)) if share < 1 else 1.0


def bound_of_sums(images: Numbers) -> float:
    """Upper bound (97.5 %) of the sum over strata of the share of images that differ, if no sampled image does.

    It is the maximum of the sum over all shares q for which the probability of observing no difference, the product of
    ``(1 - q) ** n``, is at least 2.5 %. At the maximum every stratum has ``1 - q = n c`` with a common c, or q = 0
    where ``n c`` would exceed 1.

    Args:
        images: (strata,) number of images of each.

    Returns:
        The bound, a sum of shares from 0 to 1.
    """

    def excess(log_c: float) -> float:
        return float((images * np.minimum(np.log(images) + log_c, 0.0)).sum() - np.log(0.025))

    log_c = brentq(excess, -np.log(images.min()) + np.log(0.025) / images.min() - 1, -np.log(images.min()))
    return float(-np.expm1(np.minimum(np.log(images) + log_c, 0.0)).sum())
