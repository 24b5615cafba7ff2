"""Simulates the coverage of intervals over training seeds and concepts.

    python scripts/coverage_seeds.py [--repetitions 2000] [--seed 0] [--write]

prints a Markdown table; ``--write`` writes it to docs/intervals.md, and the lowest and the highest coverage of the mean
over seeds and of the difference of two recipes, for the captions of tables, to safervlm/coverage_seeds.csv.

Each study has runs that differ only in their training seed, measured with five responses to each image of the test
split's 75 concepts. On the logit scale a response is right with the recipe's mean, plus a normal deviation of its
concept (standard deviation 1, half of the variance between categories), of the training seed, and of their interaction
(.3). The true value is the mean of the distribution.

A cell has the coverage and mean width in points of the mean over seeds and of the first run's interval over new
concepts, and how often the difference of two equally good recipes with as many seeds is significant: by their groups,
and by their first runs. The exit code is 1 if the coverage over seeds is significantly below .93, or a rate of false
positives of the groups significantly above .07 (one-sided binomial tests, Holm's correction over all cells).
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pages import write_between
from scipy.special import expit
from scipy.stats import binomtest
from simulations.designs import IMAGES, TEST
from simulations.studies import header, held, write_ranges

from safervlm.statistics.differences import difference_of_shares, holm
from safervlm.statistics.intervals import interval_new_concepts, strata_of
from safervlm.statistics.seeds import DIFFERENCE, MEAN, OVER_SEEDS, difference_of_groups, share_over_seeds

ANSWERS = 5.0 * np.array([n for sizes in TEST.values() for n in sizes])
CATEGORIES = np.repeat(np.arange(len(IMAGES)), [len(sizes) for sizes in IMAGES.values()])
STRATA = strata_of(np.zeros(len(ANSWERS), int), CATEGORIES)
LEAST, MOST = 0.93, 0.07
SEEDS = (3, 5)
DEVIATIONS = (0.0, 0.1, 0.25, 0.5)  # between training seeds, on the logit scale
INTERACTION = 0.3
MEANS = (0.0, 2.0)
ROOT = Path(__file__).parent.parent

Floats = npt.NDArray[np.float64]


def runs(difficulty: Floats, mean: float, deviation: float, seeds: int, rng: np.random.Generator) -> Floats:
    """Simulates the right responses of several runs of one recipe.

    Args:
        difficulty: (concepts,) deviation of each concept.
        mean: the recipe's mean.
        deviation: standard deviation between seeds.
        seeds: number of runs.
        rng: random generator.

    Returns:
        (seeds, concepts) number of right responses.
    """
    shift = deviation * rng.standard_normal((seeds, 1)) + INTERACTION * rng.standard_normal((seeds, len(ANSWERS)))
    return rng.binomial(ANSWERS.astype(int), expit(mean + difficulty + shift)).astype(float)


def expected(mean: float, deviation: float, of_category: Floats) -> float:
    """Returns the recipe's mean share, weighted by answers, over new concepts of the categories and over seeds.

    Args:
        mean: the recipe's mean.
        deviation: standard deviation between seeds.
        of_category: (categories,) deviation of each category, which is fixed.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    spread = np.sqrt(0.5 + deviation**2 + INTERACTION**2)
    shares = expit(mean + of_category[:, None] + spread * points) @ weights / weights.sum()
    return float(np.average(shares, weights=np.bincount(CATEGORIES, ANSWERS)))


def study(mean: float, deviation: float, seeds: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Simulates one study: two recipes with the same distribution, and their seeds.

    Args:
        mean: the recipes' mean on the logit scale.
        deviation: standard deviation between seeds.
        seeds: runs of each recipe.
        rng: random generator.

    Returns:
        Coverage and width over seeds, and of the first run; whether the groups, and the first runs, differ.
    """
    of_category = np.sqrt(0.5) * rng.standard_normal(len(IMAGES))
    difficulty = of_category[CATEGORIES] + np.sqrt(0.5) * rng.standard_normal(len(ANSWERS))
    first, second = (runs(difficulty, mean, deviation, seeds, rng) for _ in range(2))
    truth = expected(mean, deviation, of_category)
    found = share_over_seeds(first, ANSWERS, STRATA)
    single = interval_new_concepts(first[0], ANSWERS, categories=CATEGORIES)
    groups = difference_of_groups(first, second, ANSWERS, STRATA)
    alone = difference_of_shares(first[0] - second[0], ANSWERS, STRATA)
    return (
        *held((found.low, found.high), truth), *held(single, truth),
        not groups.low <= 0 <= groups.high, not alone.low <= 0 <= alone.high,
    )  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        args: words of the command line; None for those of ``sys.argv``.

    Raises:
        SystemExit: a coverage is too low, or there are too many false positives.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000, help="simulated studies per cell (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    parser.add_argument("--write", action="store_true", help="write the tables of the documentation and the package")
    given = parser.parse_args(args)
    columns = ("mean", "SD of seeds", "seeds", "over seeds", "first run", "groups differ", "first runs differ")
    lines = [f"{given.repetitions} studies per cell, seed {given.seed}.\n", *header(*columns).splitlines()]
    print("\n".join(lines))
    p_values, coverages = [], []
    for number, (mean, deviation, seeds) in enumerate(product(MEANS, DEVIATIONS, SEEDS)):
        rng = np.random.default_rng((given.seed, number))
        found = np.mean([study(mean, deviation, seeds, rng) for _ in range(given.repetitions)], axis=0)
        over, width, single, single_width, groups, alone = found
        counts = [round(x * given.repetitions) for x in (over, groups)]
        p_values.append(binomtest(counts[0], given.repetitions, LEAST, "less").pvalue)
        p_values.append(binomtest(counts[1], given.repetitions, MOST, "greater").pvalue)
        coverages.append((over, 1 - groups))  # the difference of two equally good recipes is 0
        lines.append(
            f"| {mean:g} | {deviation:g} | {seeds} | {over:.3f} ({100 * width:.1f}) | "
            f"{single:.3f} ({100 * single_width:.1f}) | {groups:.3f} | {alone:.3f} |"
        )
        print(lines[-1], flush=True)
    rejected = int((holm(p_values) < 0.05).sum())
    lines.append(f"\nCells outside {LEAST:g} and {MOST:g}: {rejected} of {len(p_values)}.")
    print(lines[-1])
    if given.write:
        write_between(ROOT / "docs" / "intervals.md", "seeds", "\n".join(lines))
        parts = [(OVER_SEEDS, part) for part in (MEAN, DIFFERENCE)]
        write_ranges(ROOT / "safervlm" / "coverage_seeds.csv", parts, np.array(coverages))
    if rejected:
        sys.exit(1)


if __name__ == "__main__":
    main()
