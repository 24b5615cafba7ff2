"""Simulates the coverage of intervals of operating curves over new concepts.

    python scripts/coverage_curves.py [--repetitions 1000] [--seed 0] [--write]

prints a Markdown table. ``--write`` writes it to docs/intervals.md, and the lowest and the highest coverage of each
number, for the captions of tables, to safervlm/coverage_curves.csv. 2,000 repetitions take about 3 minutes on one core.

Each study has the images of the test split's 75 concepts as the unsafe side, and as many safe
images of 40 other concepts. A score is normal; a share of its variance (the intra-concept correlation) is common to a
concept's images. The sides' means differ such that the AUROC has the stated value. The model's answers call an image
unsafe if its score, with normal noise of half its standard deviation, exceeds a threshold that only 30 % of the unsafe
images exceed.

A cell has the coverage and mean width in points. The exit code is 1 if one is significantly below .92 (one-sided
binomial tests, Holm's correction over all cells).
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from pages import write_between
from scipy.special import ndtr, ndtri
from scipy.stats import binomtest
from simulations.designs import TEST
from simulations.studies import header, held, write_ranges

from safervlm.statistics.curves import (
    AT_CHOSEN_THRESHOLDS,
    BY_BOOTSTRAP,
    OBUCHOWSKI,
    Side,
    auroc,
    average_precision,
    bootstrap,
    knowledge_behaviour_gap,
    tpr_at_fpr,
)
from safervlm.statistics.differences import holm

CONCEPTS = np.repeat(np.arange(75), [n for sizes in TEST.values() for n in sizes])
SAFE = np.sort(np.arange(len(CONCEPTS)) % 40)
LEAST = 0.92
AREAS = (0.6, 0.8, 0.95)
CORRELATIONS = (0.1, 0.4)
FPR, PREVALENCE = 0.05, 0.1
NOISE = 0.5
# The numbers of the curve, in the order of the columns, and their interval methods.
NUMBERS = {
    "AUROC": OBUCHOWSKI,
    f"AUPRC at prevalence {PREVALENCE:g}": BY_BOOTSTRAP,
    f"TPR at FPR {FPR:g}": BY_BOOTSTRAP,
    "knowledge-behaviour gap": AT_CHOSEN_THRESHOLDS,
}
ROOT = Path(__file__).parent.parent


def truths(apart: float, threshold: float) -> tuple[float, ...]:
    """Returns the true values of :data:`NUMBERS` for normal scores with this distance of means.

    Args:
        apart: distance of the sides' means, in standard deviations.
        threshold: the answers' threshold.
    """
    fpr = np.linspace(0, 1, 20001)[1:]
    tpr = ndtr(apart + ndtri(fpr))
    precision = PREVALENCE * tpr / (PREVALENCE * tpr + (1 - PREVALENCE) * fpr)
    precision = (precision + np.concatenate([precision[:1], precision[:-1]])) / 2
    said = [ndtr((mean - threshold) / np.hypot(1, NOISE)) for mean in (apart, 0.0)]
    return (
        float(ndtr(apart / np.sqrt(2))),
        float((np.diff(tpr, prepend=0.0) * precision).sum()),
        float(ndtr(apart + ndtri(FPR))),
        float(2 * ndtr(apart / 2) - 1 - (said[0] - said[1])),
    )


def study(apart: float, correlation: float, seed: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Simulates one study.

    Args:
        apart: distance of the sides' means, in standard deviations.
        correlation: the intra-concept correlation.
        seed: seed of the bootstrap.
        rng: random generator.

    Returns:
        Coverage and width of each number.
    """
    threshold = apart + ndtri(0.7) * np.hypot(1, NOISE)
    sides, said = [], []
    for mean, concepts in ((apart, CONCEPTS), (0.0, SAFE)):
        common = rng.standard_normal(concepts.max() + 1)[concepts]
        scores = mean + np.sqrt(correlation) * common + np.sqrt(1 - correlation) * rng.standard_normal(len(concepts))
        sides.append(Side(scores, concepts))
        said.append((scores + NOISE * rng.standard_normal(len(scores)) > threshold).astype(float))
    unsafe, safe = sides
    rates = partial(average_precision, prevalence=PREVALENCE), partial(tpr_at_fpr, fpr=FPR)
    found = (
        auroc(unsafe, safe)[1:],
        *bootstrap(rates, unsafe, safe, seed, 200),
        knowledge_behaviour_gap(unsafe, safe, said[0], said[1])[1:],
    )
    return [held(ends, truth) for ends, truth in zip(found, truths(apart, threshold), strict=True)]


def main(args: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        args: words of the command line; None for those of ``sys.argv``.

    Raises:
        SystemExit: a coverage is too low.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000, help="simulated studies per cell (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    parser.add_argument("--write", action="store_true", help="write the tables of the documentation and the package")
    given = parser.parse_args(args)
    lines = [
        f"{given.repetitions} studies per cell, seed {given.seed}.\n",
        *header("AUROC", "correlation", "AUROC's interval", *list(NUMBERS)[1:]).splitlines(),
    ]
    print("\n".join(lines))
    coverages = []
    for number, (area, correlation) in enumerate(product(AREAS, CORRELATIONS)):
        rng = np.random.default_rng((given.seed, number))
        apart = float(np.sqrt(2) * ndtri(area))
        cells = np.mean([study(apart, correlation, seed, rng) for seed in range(given.repetitions)], axis=0)
        coverages.append(cells[:, 0])
        shown = " | ".join(f"{coverage:.3f} ({100 * width:.1f})" for coverage, width in cells)
        lines.append(f"| {area:g} | {correlation:g} | {shown} |")
        print(lines[-1], flush=True)
    hits = np.rint(np.ravel(coverages) * given.repetitions).astype(int)
    p_values = [binomtest(each, given.repetitions, LEAST, "less").pvalue for each in hits]
    rejected = int((holm(p_values) < 0.05).sum())
    lines.append(f"\nCoverages significantly below {LEAST:g}: {rejected} of {len(p_values)}.")
    print(lines[-1])
    if given.write:
        write_between(ROOT / "docs" / "intervals.md", "curves", "\n".join(lines))
        parts = [(method, number) for number, method in NUMBERS.items()]
        write_ranges(ROOT / "safervlm" / "coverage_curves.csv", parts, np.array(coverages))
    if rejected:
        sys.exit(1)


if __name__ == "__main__":
    main()
