"""Rates corrected for the judge's error, using a sample of responses that people labelled.

All N responses of a run have a verdict. People label n of them, sampled within strata: verdict by confidence. With
y = 1 where a person's label is the right answer, and P_h the mean of y in stratum h, the corrected rate is
post-stratified:

    theta = sum_h N_h / N  P_h  =  mean of z,    z_i = P_h(i) + [i is labelled] N_h / n_h (y_i - P_h(i))

It assumes nothing about the judge: whatever its errors are, theta is consistent. If the strata are the verdicts, it is
the power-tuned prediction-powered estimator (Angelopoulos, Duchi and Zrnic 2023, PPI++: Efficient Prediction-Powered
Inference, arXiv 2311.01453). Labels are of one run and are never carried over to another: a judge's errors depend on
the responses that it classifies.

Two intervals: over other samples of labels of the same responses (*this run*: how people would label exactly these
responses), and over other concepts and other labels (*new concepts*). Simulated coverage:
``scripts/coverage_labels.py``, docs/intervals.md.
"""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

from safervlm.statistics.differences import Difference, difference_of_shares
from safervlm.statistics.intervals import (
    FEWEST_CONCEPTS,
    Floats,
    Numbers,
    effective_clusters,
    effective_interval,
    exact_interval,
    freedom_within,
    ratio_squares,
    size_if_all_alike,
    strata_of,
)

FEWEST = 5  # labels of a stratum, if it has as many responses
THIRDS = 3  # parts of a verdict by confidence
FEWEST_OF_A_PART = 20  # responses of a verdict for each part

# Name of the interval method, and the parts that :func:`safervlm.statistics.intervals.coverage` knows.
BY_LABELS = "labels of people (stratified)"
OF_THIS_RUN, OF_NEW_CONCEPTS = "this run", "new concepts"


@dataclass(frozen=True, slots=True)
class Labelled:
    """Responses of a run, of which people labelled a sample.

    Attributes:
        verdicts: (responses,) the judge's verdict of each, as a number.
        strata: (responses,) the stratum of the sample that each is in, as a number from 0 without gaps. A stratum lies
            within a verdict and has at least one label.
        labelled: (responses,) whether a person labelled it.
        right: (responses,) 1 if the person's label counts (for an accuracy: is the right answer), else 0; not used
            where there is no label.
    """

    verdicts: Numbers
    strata: Numbers
    labelled: npt.NDArray[np.bool_]
    right: Floats

    def values(self) -> Floats:
        """Returns z of each response, whose mean is the corrected rate.

        Raises:
            ValueError: A stratum has no label.
        """
        sizes, labels = np.bincount(self.strata), np.bincount(self.strata, self.labelled)
        if not labels.all():
            raise ValueError("a stratum has no label")
        shares = np.bincount(self.strata, self.labelled * self.right) / labels
        expected = shares[self.strata]
        return np.where(self.labelled, (sizes / labels)[self.strata] * (self.right - expected), 0.0) + expected


def strata_of_verdicts(cells: Numbers, verdicts: Numbers, confidence: Floats) -> Numbers:
    """Returns the strata to sample labels within: verdict by third of the judge's confidence, in each cell.

    Args:
        cells: (responses,) the capability and side of each, as a number: each has its own rate.
        verdicts: (responses,) the judge's verdict of each, as a number.
        confidence: (responses,) the judge's probability of its verdict.

    Returns:
        (responses,) the stratum of each, as a number from 0 without gaps. A verdict of fewer than 40 responses has one
        part, a verdict of fewer than 60 has two.
    """
    groups = np.unique(cells * (verdicts.max(initial=0) + 1) + verdicts, return_inverse=True)[1]
    parts = np.zeros(len(groups), int)
    for group in range(int(groups.max(initial=-1)) + 1):
        own = np.flatnonzero(groups == group)
        count = min(THIRDS, max(len(own) // FEWEST_OF_A_PART, 1))
        ranks = np.empty(len(own), int)
        ranks[np.argsort(confidence[own], kind="stable")] = np.arange(len(own))
        parts[own] = ranks * count // len(own)
    return np.unique(groups * THIRDS + parts, return_inverse=True)[1]


def allocation(strata: Numbers, confidence: Floats, labels: int) -> Numbers:
    """Returns how many responses of each stratum to label, by Neyman's allocation.

    It is proportional to the number of responses times their standard deviation, for which the mean of
    ``sqrt(m (1 - m))`` over the judge's probabilities m is averaged with the mean over all strata, to limit the
    effect of an overconfident judge. Neyman (1934), On the two different aspects of the representative method,
    Journal of the Royal Statistical Society 97.

    Args:
        strata: (responses,) result of :func:`strata_of_verdicts`.
        confidence: (responses,) the judge's probability of its verdict.
        labels: Number of responses to label; at least five of each stratum (all of a smaller one) are labelled even if
            that is more.

    Returns:
        (strata,) number of labels.
    """
    sizes = np.bincount(strata)
    deviations = np.bincount(strata, np.sqrt(confidence * (1 - confidence))) / sizes
    deviations = (deviations + np.average(deviations, weights=sizes)) / 2 + 1e-9
    wanted = np.minimum(sizes, FEWEST)
    shares = (sizes * deviations).tolist()
    lacking = [(-share / (wanted[i] + 1), i) for i, share in enumerate(shares) if wanted[i] < sizes[i]]
    heapify(lacking)
    for _ in range(min(labels, len(strata)) - int(wanted.sum())):  # the stratum furthest below its share gets a label
        _, i = heappop(lacking)
        wanted[i] += 1
        if wanted[i] < sizes[i]:
            heappush(lacking, (-shares[i] / (int(wanted[i]) + 1), i))
    return wanted


def sample(strata: Numbers, wanted: Numbers, rng: np.random.Generator) -> Numbers:
    """Samples responses within strata, without replacement.

    Args:
        strata: (responses,) the stratum of each.
        wanted: (strata,) number of responses of each, see :func:`allocation`.
        rng: Random generator.

    Returns:
        (labels,) indices of the responses, in random order.
    """
    chosen = [
        rng.choice(np.flatnonzero(strata == stratum), count, replace=False) for stratum, count in enumerate(wanted)
    ]
    return rng.permutation(np.concatenate(chosen))


def interval_this_run(responses: Labelled, weights: Floats | None = None) -> tuple[float, float]:
    """Computes the 95 % interval of the corrected rate over other samples of labels of the same responses.

    For each verdict v, the design variance V of its share P becomes an effective number of labels ``P (1 - P) / V``,
    from a quarter of the labels to twice their number over the share of unlabelled responses; without an error the
    number itself over that share. Clopper and Pearson's intervals of these sizes are joined by MOVER (Zou and Donner
    2008, Statistics in Medicine 27). Wilson's and Jeffreys' intervals have coverage down to .87 near 0 and 1.

    Args:
        responses: The responses.
        weights: (responses,) weight of each in the rate; None weights them equally.

    Returns:
        Lower and upper end.
    """
    weights = np.ones(len(responses.strata)) if weights is None else weights
    values = responses.values()
    sizes, labels = np.bincount(responses.strata), np.bincount(responses.strata, responses.labelled)
    shares = np.bincount(responses.strata, responses.labelled * responses.right) / labels
    errors = weights * (responses.right - shares[responses.strata])
    # Variance of a stratum's total, with the finite population correction.
    squares = np.bincount(responses.strata, responses.labelled * errors**2) / np.maximum(labels - 1, 1)
    variances = sizes * (sizes - labels) / labels * squares
    value, distances = float(np.average(values, weights=weights)), np.zeros(2)
    for verdict in np.unique(responses.verdicts):
        of = responses.verdicts == verdict
        total, count = weights[of].sum(), responses.labelled[of].sum()
        unlabelled = 1 - count / of.sum()
        if unlabelled == 0:
            continue  # everything is known
        share = min(max(float(values[of] @ weights[of] / total), 0.0), 1.0)
        variance = variances[np.unique(responses.strata[of])].sum() / total**2
        count *= float(total**2 / (weights[of] ** 2).sum() / of.sum())  # equal weights: the labels
        size = count / unlabelled
        if 0 < share < 1 and variance > 1e-15:
            size = min(max(share * (1 - share) / variance, count / 4), 2 * size)
        ends = np.array(exact_interval(share, size))
        distances += (total / weights.sum() * (ends - share)) ** 2
    below, above = np.sqrt(distances)
    return max(value - float(below), 0.0), min(value + float(above), 1.0)


def interval_over_new_concepts(
    responses: Labelled, concepts: Numbers, datasets: Numbers, categories: Numbers
) -> tuple[float, float] | None:
    """Computes the 95 % interval of the corrected rate over other concepts of the same categories and other labels.

    It is that of :func:`safervlm.statistics.intervals.interval_new_concepts` for z instead of right responses, whose
    sampling error of the labels is part of the variance between concepts. The effective size is at least the smaller of
    the effective number of concepts and the number of labels.

    Args:
        responses: The responses of one dataset or several.
        concepts: (responses,) the concept of each, as a number from 0 without gaps.
        datasets: (concepts,) the dataset of each concept, as a number.
        categories: (concepts,) the category of each concept, as a number.

    Returns:
        Lower and upper end; None for fewer than 10 concepts.
    """
    answers = np.bincount(concepts).astype(np.float64)
    if len(answers) < FEWEST_CONCEPTS:
        return None
    sums = np.bincount(concepts, responses.values()).astype(np.float64)
    labels, total = float(responses.labelled.sum()), answers.sum()
    strata = strata_of(datasets, categories)
    squares = ratio_squares(sums, answers, strata)
    share = min(max(float(sums.sum() / total), 0.0), 1.0)
    least, edge = (min(size, labels) for size in (effective_clusters(answers), size_if_all_alike(answers)))
    return effective_interval(share, squares.sum(), freedom_within(squares, strata), least, total, edge)


def at_least(this_run: tuple[float, float], new: tuple[float, float]) -> tuple[float, float]:
    """Extends an interval for new concepts to contain that for these responses.

    New concepts add a source of error. The variance between concepts does not show the error of the labels if none of
    the few labelled responses contradicts the judge; the interval for these responses has exact bounds for that.

    Args:
        this_run: The interval for these responses.
        new: The interval for new concepts; NaN if there is none.

    Returns:
        Lower and upper end; NaN if there is no interval for new concepts.
    """
    return float(np.minimum(this_run[0], new[0])), float(np.maximum(this_run[1], new[1]))


def difference_this_run(
    value: float, interval: tuple[float, float], base: float, base_interval: tuple[float, float]
) -> Difference:
    """Computes the difference of two corrected rates over other labels of both, by MOVER; the labels are independent.

    Args:
        value: The corrected rate.
        interval: Its interval, a result of :func:`interval_this_run`.
        base: The corrected rate that is subtracted.
        base_interval: Its interval.

    Returns:
        The difference, without p-value.
    """
    below = np.hypot(value - interval[0], base_interval[1] - base)
    above = np.hypot(interval[1] - value, base - base_interval[0])
    return Difference(value - base, value - base - float(below), value - base + float(above))


def difference_new_concepts(
    responses: Labelled, base: Labelled, concepts: Numbers, datasets: Numbers, categories: Numbers
) -> Difference:
    """Computes the difference of two corrected rates of the same questions, over other concepts and other labels.

    Args:
        responses: The responses of the run.
        base: The responses of the run that is subtracted, to the same questions in the same order.
        concepts: (responses,) the concept of each, as a number from 0 without gaps.
        datasets: (concepts,) the dataset of each concept, as a number.
        categories: (concepts,) the category of each concept, as a number.

    Returns:
        The difference; without interval and p-value for fewer than 10 concepts.
    """
    differences = np.bincount(concepts, responses.values() - base.values()).astype(np.float64)
    return difference_of_shares(differences, np.bincount(concepts).astype(np.float64), strata_of(datasets, categories))
