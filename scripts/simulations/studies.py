"""Sampling of rates, repetition of a study, and the cells of a table."""

import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import betaincinv, expit, stdtrit

from safervlm.statistics.differences import Difference

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float] | None
Found = defaultdict[tuple[str, str], list[float]]


def rates(quantiles: Floats, mean: float | Floats, correlation: float) -> Floats:
    """Returns quantiles of the beta distribution with a given mean and intra-cluster correlation.

    Args:
        quantiles: values in [0, 1].
        mean: the mean of the distribution; an array of the shape of ``quantiles`` for one mean each.
        correlation: the intra-cluster correlation; 0 returns the mean.
    """
    if correlation == 0:
        return np.broadcast_to(np.asarray(mean, float), quantiles.shape)
    total = 1 / correlation - 1
    return betaincinv(np.maximum(total * mean, 1e-9), np.maximum(total * (1 - mean), 1e-9), quantiles)


def skewed(quantiles: Floats, mean: float, skew: str) -> Floats:
    """Returns quantiles of a skewed distribution of rates with a given mean.

    Args:
        quantiles: values in [0, 1].
        mean: the mean of the distribution.
        skew: one of :data:`simulations.designs.SKEWS`.
    """
    return expit(centre(mean, skew) + deviations(quantiles, skew))


def deviations(quantiles: Floats, skew: str) -> Floats:
    """Returns the deviations of the logits from their centre, see :func:`skewed`.

    Args:
        quantiles: values in [0, 1].
        skew: one of :data:`simulations.designs.SKEWS`.
    """
    return 0.8 * stdtrit(2, quantiles) if skew == "t" else np.where(quantiles < 0.05, -6.5, 0.0)


@cache
def centre(mean: float, skew: str) -> float:
    """Returns the centre of the logits for which the rates have a given mean.

    Args:
        mean: the mean of the rates.
        skew: one of :data:`simulations.designs.SKEWS`.
    """
    grid = (np.arange(20_000) + 0.5) / 20_000
    return float(brentq(lambda at: expit(at + deviations(grid, skew)).mean() - mean, -30, 30))


def held(interval: Interval | Difference, truth: float) -> tuple[float, float]:
    """Checks an interval against the true value.

    Args:
        interval: the interval; None if there is none.
        truth: the true value.

    Returns:
        1.0 if the interval contains the true value, else 0.0, and its length; NaN if there is no interval.
    """
    if isinstance(interval, Difference):
        interval = None if np.isnan(interval.low) else (interval.low, interval.high)
    if interval is None:
        return np.nan, np.nan
    return float(interval[0] - 1e-9 <= truth <= interval[1] + 1e-9), interval[1] - interval[0]


def repeat(repetitions: int, study: Callable[..., tuple[float, ...]], *arguments: Any) -> Floats:
    """Repeats a study.

    Args:
        repetitions: number of simulated experiments.
        study: returns pairs of coverage (0 or 1) and length, see :func:`held`.
        *arguments: the arguments of the study.

    Returns:
        Coverage and mean length of each interval of the study; NaN if there was none.
    """
    table = np.array([study(*arguments) for _ in range(repetitions)], float)
    counted = (~np.isnan(table)).sum(axis=0)
    return np.nansum(table, axis=0) / np.where(counted, counted, np.nan)


def cell(values: Floats, digits: int = 2) -> str:
    """Formats a cell of a table.

    Args:
        values: coverage and mean length.
        digits: decimal places of the length.
    """
    return f"{values[0]:.3f} ({values[1]:.{digits}f})"


def header(*columns: str) -> str:
    """Formats the header of a table.

    Args:
        *columns: the column titles.
    """
    return "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)


def write_ranges(file: Path, parts: Sequence[tuple[str, str]], coverages: Floats) -> None:
    """Writes the lowest and the highest coverage of each number, for the captions of tables.

    Args:
        file: the file.
        parts: method and part of each number, see :func:`safervlm.statistics.intervals.coverage`.
        coverages: (cells, numbers) the coverage of each interval.
    """
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("method", "part", "lowest", "highest", "cells"))
        for part, cells in zip(parts, coverages.T, strict=True):
            writer.writerow((*part, f"{cells.min():.3f}", f"{cells.max():.3f}", len(cells)))
