"""Calibration of a judge: whether its confidence equals the rate at which people agree with it."""

from dataclasses import dataclass

import numpy as np

from safervlm.statistics.intervals import Floats, Numbers, exact_interval

MAX_BINS = 5
MIN_LABELS_PER_BIN = 10  # labels, if there are several bins
SAMPLES = 2000  # of the simulated interval of the calibration error


@dataclass(frozen=True, slots=True)
class Bin:
    """Responses of similar confidence.

    Attributes:
        confidence: Mean confidence of the judge.
        accuracy: Share of right verdicts.
        low: Lower end of its 95 % interval (Clopper and Pearson, at the effective number of labels).
        high: Upper end.
        labels: Number of labels.
    """

    confidence: float
    accuracy: float
    low: float
    high: float
    labels: int


def bins_of(confidence: Floats) -> Numbers:
    """Returns the bin of each response: up to five with about as many labels, of at least 10 each.

    Args:
        confidence: (labels,) the judge's probability of its verdict. Equal values are in the same bin, so that bins may
            differ in size, and have fewer labels, where values are equal.

    Returns:
        (labels,) numbers from 0 without gaps, in ascending order of the confidence.
    """
    count = min(max(len(confidence) // MIN_LABELS_PER_BIN, 1), MAX_BINS)
    inner = np.quantile(confidence, np.arange(1, count) / count) if len(confidence) else np.zeros(0)
    return np.unique(np.searchsorted(np.unique(inner), confidence, side="right"), return_inverse=True)[1]


def reliability(confidence: Floats, right: Floats, weights: Floats) -> list[Bin]:
    """Returns the points of a calibration plot.

    Args:
        confidence: (labels,) the judge's probability of its verdict.
        right: (labels,) 1 if people agree with the verdict, else 0.
        weights: (labels,) number of responses that each stands for.
    """
    bins, found = bins_of(confidence), []
    for number in range(int(bins.max(initial=-1)) + 1):
        own = bins == number
        accuracy = weighted_share(right[own], weights[own])
        found.append(Bin(float(np.average(confidence[own], weights=weights[own])), *accuracy, int(own.sum())))
    return found


def weighted_share(right: Floats, weights: Floats) -> tuple[float, float, float]:
    """Computes a weighted share with its 95 % interval (Clopper and Pearson, at Kish's effective number of labels).

    Args:
        right: (labels,) 0 or 1.
        weights: (labels,) number of responses that each stands for.

    Returns:
        Value, lower and upper end.
    """
    share = float(np.average(right, weights=weights))
    return share, *exact_interval(share, float(weights.sum() ** 2 / (weights**2).sum()))


def calibration_error(confidence: Floats, right: Floats, weights: Floats, seed: int = 0) -> tuple[float, float, float]:
    """Computes the expected calibration error (ECE): the mean distance between confidence and accuracy over the bins.

    Naeini, Cooper and Hauskrecht (2015), Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI. Sampling
    variation makes it larger than 0 for a calibrated judge, too. The 95 % interval takes this into account: the value
    plus and minus the bound that the mean distance between the bins' true and observed accuracies does not exceed in 95
    % of samples (simulated; with one more right and one more wrong verdict in each bin). Its coverage is at least .95.

    Args:
        confidence: (labels,) the judge's probability of its verdict.
        right: (labels,) 1 if people agree with the verdict, else 0.
        weights: (labels,) number of responses that each stands for.
        seed: Seed of the simulation.

    Returns:
        Value, lower and upper end.
    """
    bins, rng = bins_of(confidence), np.random.default_rng(seed)
    value, noise = 0.0, np.zeros(SAMPLES)
    for number in range(int(bins.max(initial=-1)) + 1):
        own = bins == number
        part = weights[own].sum() / weights.sum()
        share = float(np.average(right[own], weights=weights[own]))
        value += part * abs(share - float(np.average(confidence[own], weights=weights[own])))
        size = weights[own].sum() ** 2 / (weights[own] ** 2).sum()
        likely = (share * size + 1) / (size + 2)
        noise += part * np.abs(rng.binomial(max(round(size), 1), likely, SAMPLES) / max(round(size), 1) - likely)
    bound = float(np.quantile(noise, 0.95))
    return value, max(value - bound, 0.0), min(value + bound, 1.0)
