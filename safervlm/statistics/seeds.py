"""Results of several training runs that differ only in their seed: 95 % intervals over concepts and seeds.

One run's interval does not include the variation between training seeds: two equally good recipes, trained once each,
can differ by more than it allows. With S runs of a recipe the variance of their mean has two sources that are crossed
(Cameron, Gelbach and Miller 2011, Robust inference with multiway clustering, Journal of Business & Economic Statistics
29):

    V = V_concepts + V_seeds - V_both

where V_concepts is the variance over new concepts of the seeds' mean, V_seeds the variance of the seeds' means divided
by S, and V_both, which both contain, that of the interaction of seed and concept. Simulated coverage:
``scripts/coverage_seeds.py``, docs/intervals.md.
"""

from dataclasses import dataclass

import numpy as np

from safervlm.statistics.intervals import (
    FEWEST_CONCEPTS,
    Floats,
    Numbers,
    effective_interval,
    freedom_within,
    ratio_squares,
    size_if_all_alike,
    t_interval,
)

FEWEST_SEEDS = 3  # minimum number of training runs for an interval over seeds

# Name of the interval method, and the parts that :func:`safervlm.statistics.intervals.coverage` accepts.
OVER_SEEDS = "concepts within categories and training seeds (CR2, two-way)"
MEAN, DIFFERENCE = "mean over seeds", "difference of groups"


@dataclass(frozen=True, slots=True)
class OverSeeds:
    """The mean over training seeds.

    Attributes:
        value: Mean of the seeds' shares, or of their differences from the original.
        low: Lower end of the 95 % interval over concepts and seeds; NaN if there is none.
        high: Upper end; NaN if there is none.
        deviation: Standard deviation between the seeds' values; NaN for a single seed.
        seeds: Number of seeds.
    """

    value: float
    low: float
    high: float
    deviation: float
    seeds: int


def share_over_seeds(right: Floats, answers: Floats, strata: Numbers | None = None) -> OverSeeds:
    """Computes the mean of a share over training seeds, with an interval over new concepts and new seeds.

    The interval is Korn and Graubard's, of the variance above.

    Args:
        right: (seeds, concepts) number of right responses of each run about each concept.
        answers: (concepts,) number of responses of each run about each concept, at least 1.
        strata: (concepts,) the stratum of each, from :func:`~safervlm.statistics.intervals.strata_of`.

    Returns:
        The mean; without interval for fewer than 3 seeds or 10 concepts.
    """
    mean, deviation = _mean(right, answers)
    low, high = np.nan, np.nan
    if _suffices(right):
        variance, freedom = _variance(right, answers, strata)
        most = float(answers.sum() * len(right))
        # The lower bound of the effective size is one response: seeds may differ more than concepts do.
        low, high = effective_interval(mean, variance, freedom, 1.0, most, size_if_all_alike(answers))
    return OverSeeds(mean, low, high, deviation, len(right))


def difference_over_seeds(differences: Floats, answers: Floats, strata: Numbers | None = None) -> OverSeeds:
    """Computes the mean difference from one original over training seeds, with an interval over concepts and seeds.

    Args:
        differences: (seeds, concepts) right responses of each run minus those of the original, about each concept.
        answers: (concepts,) number of responses of each run about each concept, at least 1.
        strata: (concepts,) the stratum of each, from :func:`~safervlm.statistics.intervals.strata_of`.

    Returns:
        The mean; without interval for fewer than 3 seeds or 10 concepts, or if no response differs.
    """
    mean, deviation = _mean(differences, answers)
    low, high = np.nan, np.nan
    if _suffices(differences):
        variance, freedom = _variance(differences, answers, strata)
        if variance > 1e-15:
            low, high = t_interval(mean, variance, freedom)
            low, high = max(low, -1.0), min(high, 1.0)
    return OverSeeds(mean, low, high, deviation, len(differences))


def difference_of_groups(first: Floats, second: Floats, answers: Floats, strata: Numbers | None = None) -> OverSeeds:
    """Computes the difference between two recipes, each trained with several seeds, on the same questions.

    The concepts are common to both groups, the seeds are not: V_concepts is that of the difference of the groups'
    means, V_seeds and V_both are sums over the groups.

    Args:
        first: (seeds, concepts) number of right responses of each run of the one recipe about each concept.
        second: (seeds, concepts) the same of the other recipe; the number of seeds may differ.
        answers: (concepts,) number of responses of each run about each concept, at least 1.
        strata: (concepts,) the stratum of each, from :func:`~safervlm.statistics.intervals.strata_of`.

    Returns:
        First minus second; ``deviation`` is that of a difference of single runs, the root of the summed variances;
        ``seeds`` is the smaller number. Without interval for fewer than 3 seeds in a group or 10 concepts, or if no
        response differs.
    """
    means, deviations = zip(_mean(first, answers), _mean(second, answers), strict=True)
    value, deviation = means[0] - means[1], float(np.hypot(*deviations))
    low, high = np.nan, np.nan
    if _suffices(first) and _suffices(second):
        squares = ratio_squares(first.mean(0) - second.mean(0), answers, strata)
        parts = [(float(squares.sum()), freedom_within(squares, strata), 1)]
        for group in (first, second):
            parts += _of_seeds(group, answers, strata)
        variance, freedom = _combined(parts)
        if variance > 1e-15:
            low, high = t_interval(value, variance, freedom)
            low, high = max(low, -1.0), min(high, 1.0)
    return OverSeeds(value, low, high, deviation, min(len(first), len(second)))


def _suffices(values: Floats) -> bool:
    return values.shape[0] >= FEWEST_SEEDS and values.shape[1] >= FEWEST_CONCEPTS


def _mean(values: Floats, answers: Floats) -> tuple[float, float]:
    by_seed = values.sum(1) / answers.sum()
    return float(by_seed.mean()), float(by_seed.std(ddof=1)) if len(values) > 1 else np.nan


def _variance(values: Floats, answers: Floats, strata: Numbers | None) -> tuple[float, float]:
    squares = ratio_squares(values.mean(0), answers, strata)
    of_concepts = (float(squares.sum()), freedom_within(squares, strata), 1)
    return _combined([of_concepts, *_of_seeds(values, answers, strata)])


def _of_seeds(values: Floats, answers: Floats, strata: Numbers | None) -> list[tuple[float, float, int]]:
    """V_seeds and V_both of a group: variance, degrees of freedom, sign."""
    seeds = len(values)
    of_seeds = float((values.sum(1) / answers.sum()).var(ddof=1)) / seeds
    deviations = values - values.mean(0)
    both = sum(float(ratio_squares(row, answers, strata).sum()) for row in deviations) / (seeds * (seeds - 1))
    count = len(answers) - (1 if strata is None else int(strata.max()) + 1)
    return [(of_seeds, seeds - 1.0, 1), (both, (seeds - 1.0) * count, -1)]


def _combined(parts: list[tuple[float, float, int]]) -> tuple[float, float]:
    """Returns the sum of the variances with their signs, at least the largest of them, and Satterthwaite's freedom."""
    variance = max(sum(sign * part for part, _, sign in parts), *(part for part, _, sign in parts if sign > 0))
    below = sum(part**2 / freedom for part, freedom, _ in parts if part > 0)
    return variance, max(variance**2 / below, 1.0) if below > 0 else 0.0
