"""Multiple choice with rotated options: accuracy beyond chance, and the effect of the position."""

from dataclasses import dataclass

import numpy as np

from safervlm.statistics.intervals import Floats, Numbers


@dataclass(frozen=True, slots=True)
class Positions:
    """How the position of the right option affects the answers.

    Attributes:
        chosen: (k,) share of the answers that choose each position.
        recall: (k,) accuracy where the right option has each position; NaN where it never has.
        bias: Standard deviation of the recall over positions (RStd of Zheng et al. 2024, Large language models are not
            robust multiple choice selectors, arXiv:2309.03882).
        bias_by_chance: The expected ``bias`` of a model without position bias of the same accuracy.
    """

    chosen: Floats
    recall: Floats
    bias: float
    bias_by_chance: float


def beyond_chance(share: float, options: int) -> float:
    """Corrects an accuracy for chance, ``(share - 1 / k) / (1 - 1 / k)`` with k options: 0 for guesses.

    Args:
        share: The accuracy.
        options: Number of options k, at least 2.

    Returns:
        The corrected accuracy: 1 for right answers only, 0 for guesses, negative below chance.
    """
    return (share - 1 / options) / (1 - 1 / options)


def positions(chosen: Numbers, right: Numbers, options: int) -> Positions:
    """Computes the position bias.

    Args:
        chosen: (answers,) the position that each answer chooses, from 0; another number for an answer without one.
        right: (answers,) the position of the right option.
        options: Number of options k, at least 2.

    Returns:
        The results over all answers.
    """
    hits = chosen == right
    share = float(hits.mean())
    counts = np.bincount(right, minlength=options).astype(np.float64)
    with np.errstate(invalid="ignore"):
        recall = np.bincount(right, hits, minlength=options) / counts
    seen = counts > 0
    # The recalls are independent binomial shares around the same value; their variance around their mean loses 1 / k.
    by_chance = (share * (1 - share) / counts[seen]).mean() * (seen.sum() - 1) / seen.sum()
    return Positions(
        chosen=np.array([(chosen == option).mean() for option in range(options)]),
        recall=recall,
        bias=float(recall[seen].std()),
        bias_by_chance=float(by_chance**0.5),
    )
