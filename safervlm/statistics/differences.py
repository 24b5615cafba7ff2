"""Differences between two runs that were asked the same: 95 % intervals, p-values, and Holm's correction.

How often the intervals hold the truth: ``scripts/coverage.py``, docs/intervals.md.
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
    effective_freedom,
    ratio_squares,
    smoothed_sum,
    t_interval,
)

# How an interval was made, for a table's caption; ``intervals.coverage`` knows them.
SHARES_BY_CONCEPT = "paired t, concepts"
SHARES_BY_IMAGE = "paired t, images"
SHARES_BY_ITEM = "Tango, items; p: McNemar, exact"
SUMS_BY_TASK = "paired stratified t, images within tasks"
RATIOS_BY_IMAGE = "paired t, images (CR2)"


@dataclass(frozen=True, slots=True)
class Difference:
    """What a run differs in from another one.

    Attributes:
        value: the other run's number subtracted from this one's.
        low: the 95 % interval's lower end; NaN where there is none.
        high: its upper end.
        p: two-sided, for no difference; NaN where it can't be told.
    """

    value: float
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan


def difference_of_shares(differences: Floats, answers: Floats, strata: Numbers | None = None) -> Difference:
    """The difference of two shares, ``sum(differences) / sum(answers)``, over other clusters (concepts, or images).

    Student's, with the variance CR2 and the degrees of freedom
    :func:`~safervlm.statistics.intervals.effective_freedom`, but no wider than the share of clusters that differ at all
    can be (Clopper and Pearson 1934, Biometrika 26): that holds where none differs, too. Where all differ by the same
    amount, the share of those that don't is bounded so, and they may differ by anything.

    Fewer than 10 clusters: no interval, no p.

    Args:
        differences: (clusters,) right answers of the one run minus those of the other.
        answers: (clusters,) answers of each run about each cluster, at least 1.
        strata: (clusters,) the kind of each, unsafe or safe, as a number from 0: new clusters are of the same kinds.
    """
    value = float(differences.sum() / answers.sum())
    if len(answers) < FEWEST_CONCEPTS:
        return Difference(value)
    clusters = effective_clusters(answers)
    squares = ratio_squares(differences, answers, strata)
    if squares.sum() < 1e-15:
        other = most_differ(0.0, clusters)
        p = min(2 * (1 + abs(value)) ** -clusters, 1.0)  # where the interval's end is 0
        return Difference(value, value - other * (1 + value), value + other * (1 - value), p)
    freedom = effective_freedom(squares)
    low, high = t_interval(value, squares.sum(), freedom)
    most = most_differ(float(answers[differences != 0].sum() / answers.sum()), clusters)
    return Difference(value, max(low, -most), min(high, most), p_value(value, squares.sum(), freedom))


def difference_of_sums_of_means(differences: Floats, strata: Numbers, span: float = 200.0) -> Difference:
    """The difference of two sums over strata of means, paired by image, over other images of the same strata.

    The stratified t of ``interval_sum_of_means``, with 1/(2k) made-up images that lose all and as many that gain all in
    each of k strata: half of what Bonett and Price add to a stratum of changes between wrong and right (2012, Adjusted
    Wald confidence interval for a difference of binomial proportions based on paired data, Journal of Educational and
    Behavioral Statistics 37), as few images change by all. Where no image differs, the interval is the exact bound of
    :func:`bound_of_sums`.

    A stratum of fewer than 10 images: no interval, no p.

    Args:
        differences: (images,) the value of each with the one run minus that with the other.
        strata: (images,) the stratum (task) of each, as a number from 0 without holes.
        span: the largest difference there can be.
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
    """The difference of two ratios of sums over the same questions, over other clusters (images).

    Both ratios are linearised, and their residuals subtracted within a cluster; degrees of freedom as in
    :func:`difference_of_shares`. Where no question differs, the bound says by how much the ratio differs if as many
    clusters as can be (:func:`most_differ`) differ by the whole span.

    Fewer than 10 clusters: no interval, no p.

    Args:
        numerators: (questions,) such as the model's scores.
        denominators: (questions,) such as the reference's scores, positive.
        base_numerators: (questions,) the same of the run it is compared with.
        base_denominators: (questions,) the same.
        clusters: (questions,) such as the image of each, as a number from 0 without holes.
        span: the largest difference that two scores can have.
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
        most = most_differ(0.0, effective_clusters(below)) * span / float(denominators.mean())
        return Difference(0.0, -most, most, 1.0)
    if squares.sum() < 1e-15:
        return Difference(value)
    freedom = effective_freedom(squares)
    return Difference(value, *t_interval(value, squares.sum(), freedom), p_value(value, squares.sum(), freedom))


def difference_of_items(lost: int, gained: int, items: int) -> Difference:
    """The difference of two shares of the same independent items, ``(gained - lost) / items``.

    The interval is Tango's score interval (1998, Equivalence test and confidence interval for the difference in
    proportions for the paired-sample design, Statistics in Medicine 17), which holds where no item differs, too; p is
    McNemar's.

    Args:
        lost: the items that the other run had right and this one has not.
        gained: those that this run has right and the other one had not.
        items: all of them, at least one.
    """
    value = (gained - lost) / items

    def score(difference: float) -> float:
        """The score statistic of that difference, falling in it; the normal quantiles are its interval's ends."""
        if abs(difference - value) < 1e-12:
            return 0.0  # where the variance may be 0, too
        # The share of lost items by maximum likelihood, given the difference: the larger root of 2 n q^2 + b q + c.
        b = (2 * items - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        q = (np.sqrt(b * b - 8 * items * c) - b) / (4 * items)
        return float((gained - lost - items * difference) / np.sqrt(items * (2 * q + difference * (1 - difference))))

    edge = 1 - 1e-9  # the variance is 0 at 1
    low = brentq(lambda x: score(x) - NORMAL, -edge, value) if lost < items else -1.0
    high = brentq(lambda x: score(x) + NORMAL, value, edge) if gained < items else 1.0
    return Difference(value, float(low), float(high), mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p of McNemar's test (1947, Psychometrika 12): items change as often one way as the other.

    Args:
        lost: the items that changed from right to wrong.
        gained: those that changed from wrong to right.
    """
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def holm(p_values: Sequence[float] | Floats) -> Floats:
    """Holm's adjusted p-values (1979, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6).

    Args:
        p_values: (tests,); NaN stays NaN and doesn't count as a test.

    Returns:
        (tests,) those below .05 are the differences that can be claimed together, at most 5 % of such claims holding a
        wrong one.
    """
    adjusted = np.array(p_values, np.float64)
    tests = np.flatnonzero(~np.isnan(adjusted))
    order = tests[np.argsort(adjusted[tests], kind="stable")]
    raised = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted


def p_value(value: float, variance: float, freedom: float) -> float:
    """Student's two-sided p of no difference: below .05 exactly where the t interval leaves 0 out."""
    return float(2 * stdtr(freedom, -abs(value) / np.sqrt(variance)))


def most_differ(share: float, clusters: float) -> float:
    """The upper end of Clopper and Pearson's 95 % interval of the share of clusters that differ, "none of n" included.

    Args:
        share: of the clusters found to differ.
        clusters: how many there are.
    """
    return float(betaincinv(share * clusters + 1, (1 - share) * clusters, 0.975)) if share < 1 else 1.0


def bound_of_sums(images: Numbers) -> float:
    """The largest sum over strata of the share of images that differ, if none of those drawn does (at 97.5 %).

    Shares q for which the chance of that, the product of ``(1 - q) ** n``, isn't below 2.5 %: the sum is largest where
    every stratum has ``1 - q = n c`` with one c for all, and q = 0 where ``n c`` would exceed 1.

    Args:
        images: (strata,) the images of each.
    """

    def excess(log_c: float) -> float:
        return float((images * np.minimum(np.log(images) + log_c, 0.0)).sum() - np.log(0.025))

    log_c = brentq(excess, -np.log(images.min()) + np.log(0.025) / images.min() - 1, -np.log(images.min()))
    return float(-np.expm1(np.minimum(np.log(images) + log_c, 0.0)).sum())
