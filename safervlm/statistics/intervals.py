"""95 % intervals for clustered answers: over other images of the same concepts or tasks, or over other concepts.

How often they hold the truth is simulated on the data sets' clusters: ``scripts/coverage.py``, docs/intervals.md, and
:func:`coverage` for a table's caption. Differences between runs: :mod:`safervlm.statistics.differences`.
"""

import csv
from functools import cache
from importlib.resources import files
from math import ceil, floor

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, stdtrit

FEWEST_CONCEPTS = 10  # that an interval for new concepts takes (and images, for other images of a task)

# How an interval was made, for a table's caption; :func:`coverage` knows them and ``safervlm.results.measures``'s.
BY_TASK = "stratified t (Price-Bonett), images within tasks"
BY_IMAGE = "Wilson, effective number of images"
RATIO_BY_IMAGE = "t, images (CR2)"

NORMAL = float(stdtrit(np.inf, 0.975))

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.integer]


def effective_interval(share: float, variance: float, freedom: float, least: float, most: float) -> tuple[float, float]:
    """Korn and Graubard's 95 % interval of a proportion from a clustered sample.

    The effective sample size ``share (1 - share) / variance``, shrunk by the squared ratio of the normal to the t
    quantile because the variance is itself an estimate, goes into Clopper and Pearson's exact interval.

    Args:
        share: the proportion, 0 to 1.
        variance: the estimated variance of ``share``; 0 says nothing, the clusters may be alike by luck.
        freedom: the degrees of freedom of ``variance``; 0 where it can't be estimated.
        least: the least effective size there can be, :func:`effective_clusters`: as if all answers of a cluster were
            the same. It stands in where the variance says nothing (a share of 0 or 1, or no degrees of freedom), and
            the interval is then valid still: clusters of one size vary at most as that binomial does (Hoeffding
            1956).
        most: the greatest size that is believed.
    """
    size = least
    if 0 < share < 1 and freedom > 0 and variance > 1e-15:
        shrink = float(NORMAL / stdtrit(freedom, 0.975)) ** 2
        size = min(max(share * (1 - share) / variance * shrink, least), most)
    right = share * size
    low = float(betaincinv(right, size - right + 1, 0.025)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, size - right, 0.975)) if right < size else 1.0
    return low, high


def effective_clusters(answers: Floats) -> float:
    """The number of equally large clusters that would carry as much as these, ``(sum n)^2 / sum n^2``.

    Args:
        answers: (clusters,) the answers n of each.
    """
    return float(answers.sum() ** 2 / (answers**2).sum())


def effective_freedom(squares: Floats, last: float | None = None) -> float:
    """Satterthwaite's degrees of freedom of a sum of squares, by the squares themselves.

    ``2 (sum s)^2 / sum s^2 - 1``: 1 where a single cluster carries all the variance, 3 where two do, so it stays honest
    where a few concepts make all the errors. It lies half-way between Satterthwaite's plain ratio, which is a third of
    what it should be for normal clusters as every square is estimated with one degree of freedom (intervals cover .96
    to 1), and the ratio without that bias, ``3 (sum s)^2 / sum s^2 - 2`` (von Davier 2025, An improved Satterthwaite
    effective degrees of freedom estimator, arXiv 2503.22080; by simulation Johnson and Rust 1992, Journal of
    Educational Statistics 17), with which intervals of shares near 1 cover .91.

    Args:
        squares: (clusters,) each cluster's contribution to the variance, not negative.
        last: the most there can be; the number of clusters less one if not given.
    """
    last = float(len(squares) - 1) if last is None else float(last)
    total = squares.sum()
    return float(min(2 * total**2 / (squares**2).sum() - 1, last)) if total > 0 else last


def ratio_squares(numerators: Floats, denominators: Floats, strata: Numbers | None = None) -> Floats:
    """Each cluster's contribution to the variance of ``sum(numerators) / sum(denominators)``, linearised.

    It is Bell and McCaffrey's CR2 (2002, Survey Methodology 28) of a mean: a square is enlarged by the share that its
    cluster has in the ratio it is measured from, that of its stratum.

    Args:
        numerators: (clusters,) the sum over each cluster.
        denominators: (clusters,) the sum over each cluster, positive.
        strata: (clusters,) the stratum of each, as a number from 0 without holes, where new clusters are drawn within
            strata (unsafe and safe concepts); one of a single cluster has no variance to be told.
    """
    if strata is None:
        strata = np.zeros(len(denominators), int)
    above, below = np.bincount(strata, numerators), np.bincount(strata, denominators)
    residuals = numerators - (above / below)[strata] * denominators
    alone = np.bincount(strata)[strata] == 1
    shares = np.where(alone, 0.0, denominators / below[strata])
    return residuals**2 / (1 - shares) / denominators.sum() ** 2


def interval_these_concepts(right: Floats, answers: Floats, concepts: Numbers) -> tuple[float, float]:
    """The 95 % interval of ``sum(right) / sum(answers)`` over other images of the same concepts.

    The variance is the linearised one of a ratio, stratified by concept, clustered by image. Concepts with a single
    image share one stratum (a collapsed one: its variance is too large rather than too small). Where concepts differ it
    is smaller than that of independent answers: with an intra-concept correlation of r by the factor 1 - r. Down to a
    half that is believed.

    Args:
        right: (images,) right answers to each image (or to each question about a name).
        answers: (images,) answers to each image, at least 1.
        concepts: (images,) the concept of each, as a number from 0.
    """
    share = right.sum() / answers.sum()
    residuals = (right - share * answers) / answers.sum()
    images = np.bincount(concepts)
    singles = len(images)  # the number of the stratum of concepts with one image
    strata = np.where(images[concepts] == 1, singles, concepts)
    images = np.bincount(strata, minlength=singles + 1)
    means = np.bincount(strata, residuals, singles + 1) / np.maximum(images, 1)
    if images[singles] == 1:
        means[singles] = 0.0  # nothing to share with: measured from the overall mean, again too large
    squares = (residuals - means[strata]) ** 2 * images[strata] / np.maximum(images[strata] - 1, 1)
    freedom = effective_freedom(squares, np.maximum(images - 1, 0).sum())
    return effective_interval(share, squares.sum(), freedom, effective_clusters(answers), 2 * answers.sum())


def interval_new_concepts(right: Floats, answers: Floats, strata: Numbers | None = None) -> tuple[float, float] | None:
    """The 95 % interval of ``sum(right) / sum(answers)`` over other concepts; None for fewer than 10.

    The variance is CR2's (:func:`ratio_squares`). A sample of concepts is never taken to be better than independent
    answers. Concepts of two kinds have an interval each, whose distances from the shares are added as variances are
    (MOVER: Zou and Donner 2008, Construction of confidence limits about effect measures, Statistics in Medicine 27):
    what the kinds differ in is no variance between concepts.

    Args:
        right: (concepts,) right answers about each concept.
        answers: (concepts,) answers about each concept, at least 1.
        strata: (concepts,) the kind of each, unsafe or safe, as a number from 0 without holes; 10 of each at least.
    """
    if strata is not None and strata.any():
        kinds = [strata == kind for kind in range(int(strata.max()) + 1)]
        each = [interval_new_concepts(right[kind], answers[kind]) for kind in kinds]
        share, squares = float(right.sum() / answers.sum()), np.zeros(2)
        for kind, interval in zip(kinds, each, strict=True):
            if interval is None:
                return None
            weight, own = answers[kind].sum() / answers.sum(), right[kind].sum() / answers[kind].sum()
            squares += (weight * (np.array(interval) - own)) ** 2
        below, above = np.sqrt(squares)
        return share - float(below), share + float(above)
    if len(answers) < FEWEST_CONCEPTS:
        return None
    total, squares = answers.sum(), ratio_squares(right, answers)
    freedom = effective_freedom(squares)
    return effective_interval(right.sum() / total, squares.sum(), freedom, effective_clusters(answers), total)


def interval_ratio(numerators: Floats, denominators: Floats, clusters: Numbers) -> tuple[float, float] | None:
    """The 95 % t interval of ``sum(numerators) / sum(denominators)`` over other clusters.

    Such as a model's scores over a reference's, for questions about images. None for fewer than 10 clusters, or if all
    have the same ratio.

    Args:
        numerators: (questions,) such as the model's scores.
        denominators: (questions,) such as the reference's scores, positive.
        clusters: (questions,) such as the image of each, as a number from 0 without holes.
    """
    above, below = (np.bincount(clusters, x).astype(np.float64) for x in (numerators, denominators))
    if len(below) < FEWEST_CONCEPTS:
        return None
    squares = ratio_squares(above, below)
    if squares.sum() < 1e-15:
        return None
    return t_interval(float(above.sum() / below.sum()), squares.sum(), effective_freedom(squares))


def interval_sum_of_means(
    values: Floats, strata: Numbers, least: float = 0.0, most: float = 200.0
) -> tuple[float, float] | None:
    """The 95 % interval of the sum over strata of the mean of their values, over other images of the same tasks.

    Several strata: Price and Bonett's interval of a sum of proportions (2004, An improved confidence interval for a
    linear function of binomial proportions, Computational Statistics and Data Analysis 45), here for values between two
    bounds: each of k strata gets 2/k images at the least value and 2/k at the greatest, so one in which all are alike
    has a variance too (:func:`smoothed_sum`). One stratum: Wilson's interval (1927) of the
    effective number of images, at most four times what there are (a rarer value may not have been drawn).

    None if a stratum has fewer than 10 images.

    Args:
        values: (images,) each from ``least`` to ``most``; for MME 100 for the accuracy of its two questions and 100 if
            both are right.
        strata: (images,) the task of each, as a number from 0 without holes.
        least: the least value there can be.
        most: the greatest.
    """
    images = np.bincount(strata)
    if images.min() < FEWEST_CONCEPTS:
        return None
    value = float((np.bincount(strata, values) / images).sum())
    if len(images) > 1:
        centre, variance, freedom = smoothed_sum(values, strata, least, most, 2 / len(images))
        low, high = t_interval(centre, variance, freedom)
        return max(min(low, value), least * len(images)), min(max(high, value), most * len(images))
    share = (value - least) / (most - least)
    size, variance = float(len(values)), float(values.var(ddof=1) / (most - least) ** 2)
    if 0 < share < 1 and variance > 1e-15:
        shrink = float(NORMAL / stdtrit(size - 1, 0.975)) ** 2
        size *= min(share * (1 - share) / variance * shrink, 4.0)
    pull = NORMAL**2 / size
    half = NORMAL * float(np.sqrt(share * (1 - share) / size + pull / size / 4)) / (1 + pull)
    low, high = ((share + pull / 2) / (1 + pull) + side * half for side in (-1, 1))
    return least + (most - least) * min(low, share), least + (most - least) * max(high, share)


def smoothed_sum(
    values: Floats, strata: Numbers, least: float, most: float, extra: float
) -> tuple[float, float, float]:
    """The sum of the strata's means, its variance and Satterthwaite's degrees of freedom, with made-up values added.

    Args:
        values: (images,) each from ``least`` to ``most``.
        strata: (images,) the stratum of each, as a number from 0 without holes; two images each at least.
        least: the least value there can be.
        most: the greatest.
        extra: how many values of each of these two are added to a stratum.
    """
    counted = np.bincount(strata)
    images = counted + 2 * extra
    means = (np.bincount(strata, values) + extra * (least + most)) / images
    squares = np.bincount(strata, (values - means[strata]) ** 2) + extra * ((least - means) ** 2 + (most - means) ** 2)
    variances = squares / (images - 1) / images
    total = variances.sum()
    return float(means.sum()), float(total), float(total**2 / (variances**2 / (counted - 1)).sum())


def t_interval(value: float, variance: float, freedom: float) -> tuple[float, float]:
    """Student's 95 % interval."""
    half = float(stdtrit(freedom, 0.975) * np.sqrt(variance))
    return value - half, value + half


def interval_paired(differences: Floats) -> tuple[float, float] | None:
    """The 95 % t interval of a mean of differences, one a concept; None for fewer than 10, or if all are the same.

    Args:
        differences: (concepts,) each between -1 and 1.
    """
    if len(differences) < FEWEST_CONCEPTS or np.ptp(differences) < 1e-12:
        return None
    squares = (differences - differences.mean()) ** 2
    variance = squares.sum() / (len(squares) - 1) / len(squares)
    low, high = t_interval(float(differences.mean()), variance, effective_freedom(squares))
    return max(low, -1.0), min(high, 1.0)


@cache
def _coverage() -> tuple[tuple[str, str, float, float], ...]:
    text = files("safervlm").joinpath("coverage.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple((row["method"], row["part"], float(row["lowest"]), float(row["highest"])) for row in rows)


def coverage(method: str, part: str | None = None) -> str | None:
    """How often intervals made this way held the truth in simulations, such as ".94 to .98"; None if not simulated.

    Args:
        method: what the table names; :data:`BY_TASK` and its like here and in :mod:`safervlm.statistics.differences`,
        and the
            methods of ``safervlm.results.measures``.
        part: ``overall``, or ``category`` for the few concepts of one; all that was simulated if not given.
    """
    found = [row[2:] for row in _coverage() if row[0] == method and part in (None, row[1])]
    if not found:
        return None
    # Outward: a rounded range must not promise more than was found.
    lowest = floor(100 * min(low for low, _ in found) + 1e-9) / 100
    highest = ceil(100 * max(high for _, high in found) - 1e-9) / 100
    return " to ".join(f"{end:.2f}".removeprefix("0") for end in (lowest, highest))
