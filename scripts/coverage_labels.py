"""Simulates the coverage of rates that are corrected for the judge's error by labels of people.

    python scripts/coverage_labels.py [--repetitions 2000] [--seed 0] [--write]

prints a Markdown table; ``--write`` puts it into docs/intervals.md, and the lowest and the highest coverage of both
intervals, for the captions of tables, into safervlm/coverage_labels.csv.

Each study has five responses to each image of the test split's 75 concepts (1,725 in all), whose right shares are
sampled from a beta distribution (intra-concept correlation .15). The judge's score of a response is normal around plus
or minus a value that gives its accuracy; 30 % of the variance of its noise are shared within a concept. Its confidence
is calibrated, or overconfident (log-odds times 4); a biased judge's scores are shifted by .5 towards "right". The true
value of *this run* is the share of right responses, that of *new concepts* the mean of the distribution.

A cell has the coverage and the mean width in points, the width relative to Wilson's interval of as many labels without
the judge, and the bias and coverage of the judge's own rate. The exit code is 1 if a coverage is significantly below
.94 (one-sided binomial tests, Holm's correction over all cells) or a relative width is above .9.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pages import write_between
from scipy.special import expit, ndtri
from scipy.stats import binomtest
from simulations.designs import IMAGES, TEST
from simulations.studies import header, held, rates, write_ranges

from safervlm.statistics.correction import (
    BY_LABELS,
    OF_NEW_CONCEPTS,
    OF_THIS_RUN,
    Labelled,
    allocation,
    at_least,
    interval_over_new_concepts,
    interval_this_run,
    sample,
    strata_of_verdicts,
)
from safervlm.statistics.differences import holm
from safervlm.statistics.intervals import NORMAL, interval_new_concepts

ROOT = Path(__file__).parent.parent
QUESTIONS = 5
CORRELATION = 0.15
SHARED = 0.3  # share of the judge's noise that the responses about a concept have in common
LEAST, WIDEST = 0.94, 0.9
LABELS = (50, 100, 200, 300)
SIZES = QUESTIONS * np.array([n for sizes in TEST.values() for n in sizes])
CATEGORIES = np.repeat(np.arange(len(IMAGES)), [len(sizes) for sizes in IMAGES.values()])
CONCEPTS = np.repeat(np.arange(len(SIZES)), SIZES)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judge:
    """A judge of a study.

    Attributes:
        name: name in the table.
        accuracy: share of right verdicts of an unbiased judge.
        overconfidence: factor of the log-odds.
        bias: constant added to all scores.
    """

    name: str
    accuracy: float
    overconfidence: float = 1.0
    bias: float = 0.0


JUDGES = (
    Judge("calibrated", 0.85),
    Judge("calibrated", 0.95),
    Judge("calibrated", 0.98),
    Judge("overconfident", 0.85, 4.0),
    Judge("overconfident", 0.95, 4.0),
    Judge("overconfident, biased", 0.85, 4.0, 0.5),
    Judge("overconfident, biased", 0.95, 4.0, 0.5),
)


def responses(judge: Judge, rate: float, rng: np.random.Generator) -> tuple[Floats, npt.NDArray[np.integer], Floats]:
    """Simulates responses and a judge's verdicts on them.

    Args:
        judge: the judge.
        rate: mean share of right responses.
        rng: random generator.

    Returns:
        (responses,) whether each is right, the verdict (1: right), and the judge's probability of it.
    """
    by_concept = rates(rng.random(len(SIZES)), rate, CORRELATION)
    right = (rng.random(len(CONCEPTS)) < by_concept[CONCEPTS]).astype(float)
    shared = rng.standard_normal(len(SIZES))[CONCEPTS]
    noise = np.sqrt(SHARED) * shared + np.sqrt(1 - SHARED) * rng.standard_normal(len(CONCEPTS))
    distance = float(ndtri(judge.accuracy))
    scores = distance * (2 * right - 1) + noise + judge.bias
    confidence = expit(np.abs(2 * distance * scores * judge.overconfidence))
    return right, (scores > 0).astype(int), confidence


def study(judge: Judge, rate: float, labels: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Simulates one study.

    Args:
        judge: the judge.
        rate: mean share of right responses.
        labels: number of labels.
        rng: random generator.

    Returns:
        Coverage and width of both corrected intervals, width of Wilson's interval of the labels only, error and
        coverage (new concepts) of the judge's own rate.
    """
    right, verdicts, confidence = responses(judge, rate, rng)
    strata = strata_of_verdicts(np.zeros(len(right), int), verdicts, confidence)
    labelled = np.zeros(len(right), bool)
    labelled[sample(strata, allocation(strata, confidence, labels), rng)] = True
    given = Labelled(verdicts, strata, labelled, right)
    run = interval_this_run(given)
    alone = interval_over_new_concepts(given, CONCEPTS, np.zeros(len(SIZES), int), CATEGORIES)
    new = at_least(run, alone or (np.nan, np.nan))
    own = interval_new_concepts(np.bincount(CONCEPTS, verdicts).astype(float), SIZES * 1.0, categories=CATEGORIES)
    truth = right.mean()
    return (
        *held(run, truth), *held(new, rate), wilson_width(truth, labels), verdicts.mean() - truth, held(own, rate)[0],
    )  # fmt: skip


def wilson_width(share: float, size: float) -> float:
    """Returns the width of Wilson's interval of a share of ``size`` labels, without the judge.

    Args:
        share: the share.
        size: number of labels.
    """
    pull = NORMAL**2 / size
    return float(2 * NORMAL * np.sqrt(share * (1 - share) / size + pull / size / 4) / (1 + pull))


def main(args: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        args: words of the command line; None for those of ``sys.argv``.

    Raises:
        SystemExit: a coverage is too low, or an interval too wide.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000, help="simulated studies per cell (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    parser.add_argument("--write", action="store_true", help="also writes docs/intervals.md and the captions' file")
    given = parser.parse_args(args)
    columns = ("judge", "accuracy", "rate", "labels", "this run", "of Wilson's width", "new concepts", "judge alone")
    lines = [f"{given.repetitions} studies per cell, seed {given.seed}.\n", *header(*columns).splitlines()]
    print("\n".join(lines))
    low, wide, coverages = [], [], []
    for number, (judge, rate, labels) in enumerate(product(JUDGES, (0.3, 0.9), LABELS)):
        rng = np.random.default_rng((given.seed, number))
        run, width, new, new_width, wilson, error, own = np.mean(
            [study(judge, rate, labels, rng) for _ in range(given.repetitions)], axis=0
        )
        low += [binomtest(round(x * given.repetitions), given.repetitions, LEAST, "less").pvalue for x in (run, new)]
        wide.append(width / wilson)
        coverages.append((run, new))
        lines.append(
            f"| {judge.name} | {judge.accuracy:g} | {rate:g} | {labels} | {run:.3f} ({100 * width:.1f}) | "
            f"{width / wilson:.2f} | {new:.3f} ({100 * new_width:.1f}) | {100 * error:+.1f}; {own:.3f} |"
        )
        print(lines[-1], flush=True)
    rejected = int((holm(low) < 0.05).sum())
    lines.append(
        f"\nCoverages significantly below {LEAST:g}: {rejected} of {len(low)}; largest relative width {max(wide):.2f}."
    )
    print(lines[-1])
    if given.write:
        write_between(ROOT / "docs" / "intervals.md", "labels", "\n".join(lines))
        parts = [(BY_LABELS, part) for part in (OF_THIS_RUN, OF_NEW_CONCEPTS)]
        write_ranges(ROOT / "safervlm" / "coverage_labels.csv", parts, np.array(coverages))
    if rejected or max(wide) > WIDEST:
        sys.exit(1)


if __name__ == "__main__":
    main()
