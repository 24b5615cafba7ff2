"""Degrees of freedom by their definition, for tests of intervals."""

import numpy as np


def freedom_of(squares, strata=None):
    """Satterthwaite's degrees of freedom of squared deviations from means: a single cluster has one degree."""
    strata = [0] * len(squares) if strata is None else list(strata)
    weighted = 0.0
    for square, stratum in zip(squares, strata, strict=True):
        n = strata.count(stratum)
        alone = np.full(n, 1 / n**2)
        alone[0] = (1 - 1 / n) ** 2  # squared deviations from the mean of (1, 0, ..., 0)
        weighted += square**2 * alone.sum() ** 2 / (alone**2).sum()
    return min(2 * sum(squares) ** 2 / weighted - 1, len(squares) - len(set(strata)))
