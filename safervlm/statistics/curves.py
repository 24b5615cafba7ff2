"""Operating curves: how well a score separates unsafe images from safe ones, with 95 % intervals over new concepts.

An image is flagged as unsafe if its score is at least a threshold. The true-positive rate (TPR) is the share of unsafe
images that are flagged, the false-positive rate (FPR) that of safe ones. Simulated coverage:
``scripts/coverage_curves.py``, docs/intervals.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit
from scipy.stats import rankdata

from safervlm.statistics.intervals import (
    FEWEST_CONCEPTS,
    Floats,
    Numbers,
    effective_clusters,
    freedom_within,
    ratio_squares,
    t_interval,
)

FOLDS = 10  # of concepts, for thresholds that are chosen on other concepts than those that they are applied to
BOOTSTRAP = 1000  # samples

# Names of interval methods, see :func:`safervlm.statistics.intervals.coverage`.
OBUCHOWSKI = "Obuchowski, concepts within categories (CR2)"
BY_BOOTSTRAP = "bootstrap of concepts"
AT_CHOSEN_THRESHOLDS = "Student, concepts within categories (CR2), thresholds as chosen"


@dataclass(frozen=True, slots=True)
class Side:
    """The scores of the images of one side, unsafe or safe.

    Attributes:
        scores: (images,) finite; higher means unsafe.
        concepts: (images,) the concept of each, as a number from 0 without gaps.
        strata: (concepts,) the stratum of each, from :func:`~safervlm.statistics.intervals.strata_of`; None is one.
    """

    scores: Floats
    concepts: Numbers
    strata: Numbers | None = None

    def squares(self, values: Floats) -> Floats:
        """Returns each concept's contribution to the variance of the mean of a value of every image.

        Args:
            values: (images,) the value of each.

        Returns:
            (concepts,) contributions, which sum to the variance.
        """
        return ratio_squares(np.bincount(self.concepts, values).astype(np.float64), self.images, self.strata)

    @property
    def images(self) -> Floats:
        """(concepts,) number of images of each concept."""
        return np.bincount(self.concepts).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Curve:
    """An operating curve.

    Attributes:
        thresholds: (points,) descending; an image is flagged if its score is at least the threshold.
        tpr: (points,) share of unsafe images that are flagged.
        fpr: (points,) share of safe images that are flagged.
    """

    thresholds: Floats
    tpr: Floats
    fpr: Floats


def curve(unsafe: Side, safe: Side) -> Curve:
    """Computes the operating curve: one point for each distinct score.

    Args:
        unsafe: Scores of unsafe images.
        safe: Scores of safe images.
    """
    return _Sorted.of(unsafe, safe).curve((np.ones(len(unsafe.scores)), np.ones(len(safe.scores))))


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Both sides' images by score, for curves with several weights.

    Attributes:
        thresholds: (points,) descending.
        orders: For each side, the images in ascending order of their scores.
        below: For each side, (points,) how many images are below each threshold.
    """

    thresholds: Floats
    orders: tuple[Numbers, ...]
    below: tuple[Numbers, ...]

    @classmethod
    def of(cls, unsafe: Side, safe: Side) -> "_Sorted":
        sides = (unsafe, safe)
        thresholds = np.unique(np.concatenate([side.scores for side in sides]))[::-1]
        orders = tuple(np.argsort(side.scores, kind="stable") for side in sides)
        below = tuple(
            np.searchsorted(side.scores[order], thresholds, side="left")
            for side, order in zip(sides, orders, strict=True)
        )
        return cls(thresholds, orders, below)

    def curve(self, weights: tuple[Floats, Floats]) -> Curve:
        rates = []
        for order, below, weight in zip(self.orders, self.below, weights, strict=True):
            sums = np.concatenate([[0.0], np.cumsum(weight[order])])
            rates.append(1 - sums[below] / sums[-1])
        return Curve(self.thresholds, rates[0], rates[1])


def auroc(unsafe: Side, safe: Side) -> tuple[float, float, float]:
    """Computes the area under the operating curve: the probability that an unsafe image scores above a safe one.

    The variance is Obuchowski's for clustered data (1997, Nonparametric analysis of clustered ROC curve data,
    Biometrics 53), with CR2 within strata; the interval is Student's on the logit scale.

    Args:
        unsafe: Scores of unsafe images.
        safe: Scores of safe images.

    Returns:
        Value, lower and upper end; the ends are NaN if a side has fewer than 10 concepts, or if all scores are the
        same. At 0 and 1 they are :func:`_interval_at_edge`.
    """
    of_unsafe = _share_below(unsafe.scores, safe.scores)
    of_safe = 1 - _share_below(safe.scores, unsafe.scores)
    value = float(of_unsafe.mean())
    if min(len(unsafe.images), len(safe.images)) < FEWEST_CONCEPTS:
        return value, np.nan, np.nan
    squares, freedom = _both(unsafe, of_unsafe, safe, of_safe)
    if not 1e-12 < value < 1 - 1e-12:
        return value, *_interval_at_edge(value, unsafe, safe)
    if squares < 1e-15:
        return value, np.nan, np.nan
    low, high = t_interval(float(logit(value)), squares / (value * (1 - value)) ** 2, freedom)
    return value, float(expit(low)), float(expit(high))


def tpr_at_fpr(points: Curve, fpr: float) -> float:
    """Returns the greatest TPR of a threshold with at most this FPR; 0 if there is no such threshold.

    Points are not interpolated, because that would require randomised decisions.

    Args:
        points: The curve.
        fpr: The FPR, 0 to 1.
    """
    return float(points.tpr[points.fpr <= fpr + 1e-12].max(initial=0.0))


def average_precision(points: Curve, prevalence: float) -> float:
    """Computes the area under the precision-recall curve, as the sum of precision times the steps of the TPR.

    Args:
        points: The curve.
        prevalence: Share of unsafe images among those to be judged, which need not be that of the data, 0 to 1.

    Returns:
        The area, 0 to 1.
    """
    flagged = prevalence * points.tpr + (1 - prevalence) * points.fpr
    precision = prevalence * points.tpr / np.maximum(flagged, 1e-300)
    return float((np.diff(points.tpr, prepend=0.0) * precision).sum())


def bootstrap(
    statistics: Sequence[Callable[[Curve], float]], unsafe: Side, safe: Side, seed: int, samples: int = BOOTSTRAP
) -> list[tuple[float, float]]:
    """Computes the 95 % intervals of rates of the curve over new concepts.

    They are Student's on the logit scale, with the bootstrap's standard error and the degrees of freedom of the side
    with fewer concepts: percentile intervals of these rates have coverage of .86 to .94. The concepts of each side are
    sampled with replacement, from all categories: the interval is longer than needed if categories differ. Rates of 0
    and 1 are replaced by rates half an image away, and their interval contains :func:`_interval_at_edge`.

    Args:
        statistics: Rates of a curve, for example ``lambda points: tpr_at_fpr(points, 0.05)``.
        unsafe: Scores of unsafe images.
        safe: Scores of safe images.
        seed: Seed of the samples, which are the same for all rates.
        samples: Number of samples.

    Returns:
        Lower and upper end for each rate; NaN if a side has fewer than 10 concepts, or if all samples have the same
        rate between 0 and 1.
    """
    if min(len(unsafe.images), len(safe.images)) < FEWEST_CONCEPTS:
        return [(np.nan, np.nan)] * len(statistics)
    rng = np.random.default_rng(seed)
    images, values = _Sorted.of(unsafe, safe), []
    for _ in range(samples):
        weights = []
        for side in (unsafe, safe):
            count = len(side.images)
            weights.append(rng.multinomial(count, np.full(count, 1 / count))[side.concepts].astype(np.float64))
        points = images.curve((weights[0], weights[1]))
        values.append([statistic(points) for statistic in statistics])
    edge, points = 0.5 / len(unsafe.scores), curve(unsafe, safe)
    errors = logit(np.clip(values, edge, 1 - edge)).std(axis=0, ddof=1)
    intervals = []
    for statistic, error in zip(statistics, errors.tolist(), strict=True):
        rate = statistic(points)
        ends = [_interval_at_edge(rate, unsafe, safe)] if not edge < rate < 1 - edge else []
        if error > 1e-12:
            value = float(logit(np.clip(rate, edge, 1 - edge)))
            low, high = t_interval(value, error**2, min(len(unsafe.images), len(safe.images)) - 1.0)
            ends.append((float(expit(low)), float(expit(high))))
        lows, highs = zip(*ends, strict=True) if ends else ((np.nan,), (np.nan,))
        intervals.append((min(lows), max(highs)))
    return intervals


def cross_fitted(unsafe: Side, safe: Side) -> tuple[Floats, Floats]:
    """Flags images at the threshold with the greatest TPR - FPR of other concepts.

    The concepts of each side are divided into 10 folds. The threshold for a fold is half-way between the best point of
    the curve of the other folds and the next lower score, so that it is not chosen on the images that it flags.

    Args:
        unsafe: Scores of unsafe images.
        safe: Scores of safe images.

    Returns:
        (images,) 1 if the image is flagged, else 0: of the unsafe side, and of the safe side.
    """
    folds = [side.concepts % FOLDS for side in (unsafe, safe)]
    flags = [np.zeros(len(side.scores)) for side in (unsafe, safe)]
    for fold in range(FOLDS):
        others = [
            Side(side.scores[own != fold], side.concepts[own != fold])
            for side, own in zip((unsafe, safe), folds, strict=True)
        ]
        if not all(len(side.scores) for side in others):
            continue  # too few concepts to choose a threshold on others; nothing is flagged
        points = curve(*others)
        best = int(np.argmax(points.tpr - points.fpr))
        lower = points.thresholds[min(best + 1, len(points.thresholds) - 1)]
        threshold = (points.thresholds[best] + lower) / 2
        for side, own, flagged in zip((unsafe, safe), folds, flags, strict=True):
            flagged[own == fold] = side.scores[own == fold] >= threshold
    return flags[0], flags[1]


def knowledge_behaviour_gap(
    unsafe: Side, safe: Side, said_unsafe: Floats, said_safe: Floats
) -> tuple[float, float, float]:
    """Computes how much better the scores separate unsafe from safe images than the model's answers do.

    It is TPR - FPR of the scores at their best threshold (:func:`cross_fitted`) minus that of the answers: what the
    model can tell apart but does not say. The interval is Student's over new concepts, with the thresholds as chosen.

    Args:
        unsafe: Scores of unsafe images.
        safe: Scores of safe images.
        said_unsafe: (images,) share of the answers to each unsafe image that call it unsafe.
        said_safe: (images,) share of the answers to each safe image that call it unsafe.

    Returns:
        Value, lower and upper end; the ends are NaN if a side has fewer than 10 concepts, or if nothing differs.
    """
    flags = cross_fitted(unsafe, safe)
    more, fewer = flags[0] - said_unsafe, said_safe - flags[1]
    value = float(more.mean() + fewer.mean())
    if min(len(unsafe.images), len(safe.images)) < FEWEST_CONCEPTS:
        return value, np.nan, np.nan
    squares, freedom = _both(unsafe, more, safe, fewer)
    if squares < 1e-15:
        return value, np.nan, np.nan
    low, high = t_interval(value, squares, freedom)
    return value, max(low, -2.0), min(high, 2.0)


def _interval_at_edge(value: float, unsafe: Side, safe: Side) -> tuple[float, float]:
    """Returns the interval of a rate of 0 or 1.

    The open end is the exact bound of the side with fewer effective concepts, as if the images of each concept were all
    alike.
    """
    bound = float(0.025 ** (1 / min(effective_clusters(unsafe.images), effective_clusters(safe.images))))
    return (bound, 1.0) if value > 0.5 else (0.0, 1 - bound)


def _both(unsafe: Side, of_unsafe: Floats, safe: Side, of_safe: Floats) -> tuple[float, float]:
    """Variance of the sum of both sides' means, and its degrees of freedom (Satterthwaite)."""
    parts = [unsafe.squares(of_unsafe), safe.squares(of_safe)]
    variances = [float(part.sum()) for part in parts]
    freedoms = [freedom_within(part, side.strata) for part, side in zip(parts, (unsafe, safe), strict=True)]
    below = sum(variance**2 / freedom for variance, freedom in zip(variances, freedoms, strict=True) if variance > 0)
    return sum(variances), sum(variances) ** 2 / below if below > 0 else 0.0


def _share_below(scores: Floats, others: Floats) -> Floats:
    """(scores,) the share of the others below each score; ties count half."""
    ranks = rankdata(np.concatenate([scores, others]))[: len(scores)]
    return (ranks - rankdata(scores)) / len(others)
