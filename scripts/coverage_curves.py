"""Simulates the coverage of intervals of operating curves over new concepts.

    python scripts/coverage_curves.py [--repetitions 1000] [--seed 0]

prints a Markdown table. Each study has the images of the test split's 75 concepts as the unsafe side, and as many safe
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

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import binomtest
from simulations.designs import TEST
from simulations.studies import header, held

from safervlm.statistics.curves import (
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


def truths(apart: float, threshold: float) -> dict[str, float]:
    """Returns the true values of the four numbers for normal scores with this distance of means.

    Args:
        apart: distance of the sides' means, in standard deviations.
        threshold: of the answers.
    """
    fpr = np.linspace(0, 1, 20001)[1:]
    tpr = ndtr(apart + ndtri(fpr))
    precision = PREVALENCE * tpr / (PREVALENCE * tpr + (1 - PREVALENCE) * fpr)
    precision = (precision + np.concatenate([precision[:1], precision[:-1]])) / 2
    said = [ndtr((mean - threshold) / np.hypot(1, NOISE)) for mean in (apart, 0.0)]
    return {
        "AUROC": float(ndtr(apart / np.sqrt(2))),
        "AUPRC": float((np.diff(tpr, prepend=0.0) * precision).sum()),
        "TPR at FPR": float(ndtr(apart + ndtri(FPR))),
        "gap": float(2 * ndtr(apart / 2) - 1 - (said[0] - said[1])),
    }


def study(apart: float, correlation: float, seed: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Simulates one study.

    Args:
        apart: distance of the sides' means, in standard deviations.
        correlation: the intra-concept correlation.
        seed: of the bootstrap.
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
    area, at_fpr = bootstrap(rates, unsafe, safe, seed, 200)
    found = {
        "AUROC": auroc(unsafe, safe)[1:],
        "AUPRC": area,
        "TPR at FPR": at_fpr,
        "gap": knowledge_behaviour_gap(unsafe, safe, said[0], said[1])[1:],
    }
    return [held(found[name], truth) for name, truth in truths(apart, threshold).items()]


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
    given = parser.parse_args(args)
    print(f"{given.repetitions} studies a cell, seed {given.seed}.\n")
    names = f"AUPRC at prevalence {PREVALENCE:g}", f"TPR at FPR {FPR:g}"
    print(header("AUROC", "correlation", "AUROC's interval", *names, "knowledge-behaviour gap"))
    p_values = []
    for number, (area, correlation) in enumerate(product(AREAS, CORRELATIONS)):
        rng = np.random.default_rng((given.seed, number))
        apart = float(np.sqrt(2) * ndtri(area))
        cells = np.mean([study(apart, correlation, seed, rng) for seed in range(given.repetitions)], axis=0)
        for coverage, _ in cells:
            p_values.append(binomtest(round(coverage * given.repetitions), given.repetitions, LEAST, "less").pvalue)
        shown = " | ".join(f"{coverage:.3f} ({100 * width:.1f})" for coverage, width in cells)
        print(f"| {area:g} | {correlation:g} | {shown} |", flush=True)
    rejected = int((holm(p_values) < 0.05).sum())
    print(f"\nCoverages significantly below {LEAST:g}: {rejected} of {len(p_values)}.")
    if rejected:
        sys.exit(1)


if __name__ == "__main__":
    main()
