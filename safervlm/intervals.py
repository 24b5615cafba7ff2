"""95 % intervals for clustered answers: over other images of the same concepts, or over other concepts.

How often they hold the truth, simulated on the data set's clusters: ``scripts/coverage.py``, docs/intervals.md.
"""

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, stdtrit

FEWEST_CONCEPTS = 10  # that an interval for new concepts takes

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.integer]


def effective_interval(share: float, variance: float, freedom: float, least: float, most: float) -> tuple[float, float]:
    """Korn and Graubard's 95 % interval of a proportion from a clustered sample.

    The effective sample size ``share (1 - share) / variance``, shrunk by the squared ratio of the normal to the t
    quantile because the variance is itself an estimate, goes into Clopper and Pearson's exact interval.

    Args:
        share: the proportion, 0 to 1.
        variance: the estimated variance of ``share``.
        freedom: the degrees of freedom of ``variance``; 0 where it can't be estimated.
        least: the least effective size there can be, :func:`effective_clusters`: as if all answers of a cluster were
            the same. It stands in where the variance says nothing (a share of 0 or 1, or no degrees of freedom), and
            the interval is then valid still: clusters of one size vary at most as that binomial does (Hoeffding
            1956).
        most: the number of answers: a sample of clusters is never taken to be better than independent answers.
    """
    size = least
    if 0 < share < 1 and freedom > 0:
        shrink = float(stdtrit(np.inf, 0.975) / stdtrit(freedom, 0.975)) ** 2
        size = most if variance == 0 else min(max(share * (1 - share) / variance * shrink, least), most)
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


def effective_freedom(contributions: Floats) -> float:
    """Satterthwaite's degrees of freedom of a sum of squares, by the squares themselves.

    ``(sum s)^2 / sum s^2`` is the number of clusters that carry the variance: all of them where they are alike, 2 where
    all but two answered everything right. It stays honest where a few concepts make all the errors.

    Args:
        contributions: (clusters,) the squares s, not negative.
    """
    total, last = contributions.sum(), float(len(contributions) - 1)
    return float(min(total**2 / (contributions**2).sum(), last)) if total > 0 else last


def interval_these_concepts(right: Floats, answers: Floats, concepts: Numbers) -> tuple[float, float]:
    """The 95 % interval of ``sum(right) / sum(answers)`` over other images of the same concepts.

    The variance is the linearised one of a ratio, stratified by concept, clustered by image. Concepts with a single
    image share one stratum (a collapsed one: its variance is too large rather than too small).

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
    freedom = int(np.maximum(images - 1, 0).sum())
    return effective_interval(share, squares.sum(), freedom, effective_clusters(answers), answers.sum())


def interval_new_concepts(right: Floats, answers: Floats) -> tuple[float, float] | None:
    """The 95 % interval of ``sum(right) / sum(answers)`` over other concepts; None for fewer than 10.

    The variance is Bell and McCaffrey's CR2 of a mean, its degrees of freedom are :func:`effective_freedom`.

    Args:
        right: (concepts,) right answers about each concept.
        answers: (concepts,) answers about each concept, at least 1.
    """
    if len(answers) < FEWEST_CONCEPTS:
        return None
    total = answers.sum()
    share = right.sum() / total
    squares = (right - share * answers) ** 2 / (1 - answers / total) / total**2
    return effective_interval(share, squares.sum(), effective_freedom(squares), effective_clusters(answers), total)


def interval_paired(differences: Floats) -> tuple[float, float] | None:
    """The 95 % t interval of a mean of differences, one a concept; None for fewer than 10, or if all are the same.

    Args:
        differences: (concepts,) each between -1 and 1.
    """
    if len(differences) < FEWEST_CONCEPTS or np.ptp(differences) < 1e-12:
        return None
    squares = (differences - differences.mean()) ** 2
    error = np.sqrt(squares.sum() / (len(squares) - 1) / len(squares))
    half = float(stdtrit(effective_freedom(squares), 0.975) * error)
    return max(float(differences.mean()) - half, -1.0), min(float(differences.mean()) + half, 1.0)


def interval_difference(differences: Floats, answers: Floats) -> tuple[float, float] | None:
    """The 95 % t interval of ``sum(differences) / sum(answers)`` over other concepts: two runs on the same questions.

    The variance is CR2's, as in :func:`interval_new_concepts`. None for fewer than 10 concepts, or if none differs.

    Args:
        differences: (concepts,) right answers of the one run minus those of the other.
        answers: (concepts,) answers of each run about each concept, at least 1.
    """
    if len(answers) < FEWEST_CONCEPTS or np.ptp(differences / answers) < 1e-12:
        return None
    total = answers.sum()
    value = float(differences.sum() / total)
    squares = (differences - value * answers) ** 2 / (1 - answers / total) / total**2
    half = float(stdtrit(effective_freedom(squares), 0.975) * np.sqrt(squares.sum()))
    return max(value - half, -1.0), min(value + half, 1.0)
