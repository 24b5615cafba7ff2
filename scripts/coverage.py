"""How often the 95 % intervals of ``safervlm.intervals`` hold, simulated on the real data set's clusters.

    python scripts/coverage.py [--repetitions 2000] [--seed 0]

prints Markdown tables. Each repetition draws every concept's rate from a beta distribution with the given mean and
intra-concept correlation, asks about each image once, or five times with answers to one image correlated by .5, and
forms the intervals as the scores do. *These concepts* is held against the drawn rates of the very concepts, weighted by
their images (by their answers, for names); *new concepts* against the mean of the distribution. The gap's two rates of
a concept are drawn apart, or from one quantile ("tied"); the names are asked five times, the images once.
"""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv

from safervlm.intervals import (
    FEWEST_CONCEPTS,
    interval_difference,
    interval_new_concepts,
    interval_paired,
    interval_these_concepts,
)

# Images of every concept of UnsafeConcepts, by category.
IMAGES = {
    "Hate": (3, 1, 20, 1, 10, 12, 2, 27, 13, 22),
    "Harassment": (12, 45, 10, 11, 5, 3, 3, 37, 44, 11),
    "Violence": (3, 44, 13, 50, 10, 33, 4, 39, 31, 26),
    "Self-harm": (19, 2, 15, 2, 8, 14, 11),
    "Sexual": (36, 49, 4, 35, 50, 34, 21),
    "Shocking": (6, 5, 48, 44, 26, 29, 38, 34, 48, 27),
    "Illegal activity": (4, 31, 21, 3, 8, 11, 4, 31, 7),
    "Deception": (36, 16, 4, 25, 44, 32, 14, 31, 1, 7),
    "Public and personal health": (49, 38),
}
# What the 80/20 split leaves of each for testing.
TEST = {category: tuple(n - int(0.8 * n) for n in sizes) for category, sizes in IMAGES.items()}

# What is simulated: name, images of each concept, questions an image.
DESIGNS: tuple[tuple[str, Sequence[int], int], ...] = (
    ("test part, overall", [n for sizes in TEST.values() for n in sizes], 1),
    ("test part, overall", [n for sizes in TEST.values() for n in sizes], 5),
    ("all images, overall", [n for sizes in IMAGES.values() for n in sizes], 1),
    ("all images, overall", [n for sizes in IMAGES.values() for n in sizes], 5),
    ("test part, Hate", TEST["Hate"], 1),
    ("test part, Self-harm", TEST["Self-harm"], 1),
    ("test part, Self-harm", TEST["Self-harm"], 5),
    ("test part, Public and personal health", TEST["Public and personal health"], 1),
    ("test part, Public and personal health", TEST["Public and personal health"], 5),
    ("all images, Public and personal health", IMAGES["Public and personal health"], 5),
    ("names of Public and personal health, 5 answers each", [5] * 2, 1),
    ("names, overall, 5 answers each", [5] * 75, 1),
    ("27 concepts of 8 images (pictograms)", [8] * 27, 1),
)
RATES = (0.3, 0.5, 0.8, 0.97)
CORRELATIONS = (0.0, 0.1, 0.3)
WITHIN_IMAGE = 0.5

Floats = npt.NDArray[np.float64]


def rates(quantiles: Floats, mean: float | Floats, correlation: float) -> Floats:
    """Beta-distributed rates with this mean and intra-cluster correlation, at the given quantiles."""
    if correlation == 0:
        return np.broadcast_to(np.asarray(mean, float), quantiles.shape)
    total = 1 / correlation - 1
    return betaincinv(np.maximum(total * mean, 1e-9), np.maximum(total * (1 - mean), 1e-9), quantiles)


def simulate(
    sizes: Sequence[int], questions: int, rate: float, correlation: float, repetitions: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """(repetitions, 2 and 2) whether an interval held and how long it was: these concepts, new concepts."""
    concepts = np.repeat(np.arange(len(sizes)), sizes)
    answers = np.full(len(concepts), float(questions))
    rows = []
    for _ in range(repetitions):
        by_concept = rates(rng.random(len(sizes)), rate, correlation)
        by_image = by_concept[concepts]
        if questions > 1:
            by_image = rates(rng.random(len(concepts)), by_image, WITHIN_IMAGE)
        right = rng.binomial(questions, by_image).astype(float)
        low, high = interval_these_concepts(right, answers, concepts)
        truth = by_concept[concepts].mean()
        row = [low <= truth <= high, high - low, np.nan, np.nan]
        interval = interval_new_concepts(np.bincount(concepts, right), np.bincount(concepts, answers))
        if interval:
            row[2:] = [interval[0] <= rate <= interval[1], interval[1] - interval[0]]
        rows.append(row)
    table = np.array(rows, float)
    return table[:, :2], table[:, 2:]


def simulate_gap(
    sizes: Sequence[int],
    text: float,
    image: float,
    correlation: float,
    tied: bool,
    repetitions: int,
    rng: np.random.Generator,
) -> Floats:
    """(repetitions, 2) whether the gap's interval held and how long it was; NaN where there was none."""
    images = np.asarray(sizes)
    rows = []
    for _ in range(repetitions):
        quantiles = rng.random(len(sizes))
        names = rates(quantiles, text, correlation)
        pictures = rates(quantiles if tied else rng.random(len(sizes)), image, correlation)
        interval = interval_paired(rng.binomial(5, names) / 5 - rng.binomial(images, pictures) / images)
        rows.append(
            (interval[0] <= text - image <= interval[1], interval[1] - interval[0]) if interval else (np.nan,) * 2
        )
    return np.array(rows, float)


def simulate_difference(
    sizes: Sequence[int], first: float, second: float, correlation: float, repetitions: int, rng: np.random.Generator
) -> Floats:
    """(repetitions, 2) whether the interval of a difference between two runs held, and its length; NaN without one.

    The runs share each concept's quantile (what is hard for one is hard for the other), and each image's luck by half.
    """
    images = np.asarray(sizes)
    concepts = np.repeat(np.arange(len(images)), images)
    rows = []
    for _ in range(repetitions):
        quantiles = rng.random(len(images))
        luck, shared = rng.random((2, len(concepts))), rng.random(len(concepts))
        together = rng.random(len(concepts)) < 0.5
        right = [
            (np.where(together, shared, own) < rates(quantiles, rate, correlation)[concepts]).astype(float)
            for own, rate in zip(luck, (first, second), strict=True)
        ]
        interval = interval_difference(np.bincount(concepts, right[1] - right[0]), images.astype(float))
        truth = second - first
        rows.append((interval[0] <= truth <= interval[1], interval[1] - interval[0]) if interval else (np.nan,) * 2)
    return np.array(rows, float)


def lines(repetitions: int, seed: int) -> Iterator[str]:
    """The two Markdown tables, line by line."""
    rng = np.random.default_rng(seed)
    yield f"Coverage of a nominal .95 (mean length); {repetitions} repetitions a cell, seed {seed}."
    yield ""
    columns = [f"{rate:g}, {correlation:g}" for rate in RATES for correlation in CORRELATIONS]
    yield "| clusters | questions an image | varies | " + " | ".join(columns) + " |"
    yield "|---|---|---|" + "---|" * len(columns)
    for name, sizes, questions in DESIGNS:
        cells = [
            simulate(sizes, questions, rate, correlation, repetitions, rng)
            for rate in RATES
            for correlation in CORRELATIONS
        ]
        for kind, varies in enumerate(("these concepts", "new concepts")):
            if kind == 0 or len(sizes) >= FEWEST_CONCEPTS:
                shown = " | ".join("{:.3f} ({:.2f})".format(*cell[kind].mean(axis=0)) for cell in cells)
                yield f"| {name} | {questions} | {varies} | {shown} |"
    yield ""
    yield "The modality gap (accuracy on names, on images; rates of a concept drawn apart / tied):"
    yield ""
    yield "| clusters | names, images | " + " | ".join(f"correlation {c:g}" for c in CORRELATIONS) + " |"
    yield "|---|---|" + "---|" * len(CORRELATIONS)
    for name, sizes in (
        (DESIGNS[0][0], DESIGNS[0][1]),
        (DESIGNS[2][0], DESIGNS[2][1]),
        (DESIGNS[-1][0], DESIGNS[-1][1]),
    ):
        for text, image in ((0.97, 0.3), (0.8, 0.5), (0.97, 0.97)):
            cells = []
            for correlation in CORRELATIONS:
                held = [
                    np.nanmean(simulate_gap(sizes, text, image, correlation, tied, repetitions, rng), axis=0)
                    for tied in (False, True)
                ]
                cells.append(" / ".join("{:.3f} ({:.2f})".format(*cell) for cell in held))
            yield f"| {name} | {text:g}, {image:g} | " + " | ".join(cells) + " |"


def difference_lines(repetitions: int, seed: int) -> Iterator[str]:
    """The table of the differences between two runs."""
    rng = np.random.default_rng(seed)
    yield "The difference between two runs on the same questions, one an image (accuracy of the one, of the other):"
    yield ""
    yield "| clusters | accuracies | " + " | ".join(f"correlation {c:g}" for c in CORRELATIONS) + " |"
    yield "|---|---|" + "---|" * len(CORRELATIONS)
    for design in (DESIGNS[0], DESIGNS[2], DESIGNS[-1]):
        for first, second in ((0.3, 0.9), (0.5, 0.8), (0.8, 0.8), (0.95, 0.97)):
            cells = [simulate_difference(design[1], first, second, c, repetitions, rng) for c in CORRELATIONS]
            shown = " | ".join("{:.3f} ({:.2f})".format(*np.nanmean(cell, axis=0)) for cell in cells)
            yield f"| {design[0]} | {first:g}, {second:g} | {shown} |"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000, help="simulated experiments a cell (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default 0)")
    arguments = parser.parse_args()
    for table in (lines, difference_lines):
        for line in table(arguments.repetitions, arguments.seed):
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
