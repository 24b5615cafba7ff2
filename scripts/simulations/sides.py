"""The intervals of shares over unsafe and safe images together, and of their differences."""

from collections.abc import Iterator
from itertools import product

import numpy as np

from safervlm.statistics import differences
from safervlm.statistics.differences import difference_of_shares
from safervlm.statistics.intervals import interval_new_concepts, strata_of
from simulations.designs import BY_CONCEPT, CORRELATIONS, OVERALL, TEST, categories_of
from simulations.studies import Found, cell, header, held, rates, repeat


def both_sides(
    unsafe: float, safe: float, correlation: float, questions: int, change: float, rng: np.random.Generator
) -> tuple[float, ...]:
    """Simulates the share over unsafe and safe test images, and the difference of two runs, over new concepts.

    Args:
        unsafe: accuracy on the images of the 75 unsafe concepts.
        safe: accuracy on as many safe images, each of a different concept.
        correlation: intra-concept correlation.
        questions: number of questions per image.
        change: added to both accuracies in the second run, which shares the quantile of each concept.
        rng: random generator.

    Returns:
        Coverage and length of the share's interval, then of the difference's.
    """
    sizes = np.array([n for part in TEST.values() for n in part])
    sizes = np.r_[sizes, np.ones(sizes.sum(), int)]
    datasets = np.repeat([0, 1], [75, len(sizes) - 75])
    categories = np.r_[categories_of(75), np.zeros(len(sizes) - 75, int)]
    quantiles, concepts = rng.random(len(sizes)), np.repeat(np.arange(len(sizes)), sizes)
    answers = sizes * float(questions)
    right = []
    for shift in (0.0, change):
        means = np.where(datasets == 0, unsafe + shift, safe + shift)
        by_image = rates(quantiles, means, correlation)[concepts]
        right.append(np.bincount(concepts, rng.binomial(questions, by_image)).astype(float))
    truth = float(np.average(np.where(datasets == 0, unsafe, safe), weights=sizes))
    return (
        *held(interval_new_concepts(right[0], answers, datasets, categories), truth),
        *held(difference_of_shares(right[1] - right[0], answers, strata_of(datasets, categories)), change),
    )


def sides(repetitions: int, rng: np.random.Generator, found: Found) -> Iterator[str]:
    """Simulates the intervals of shares over unsafe and safe images together.

    Args:
        repetitions: number of simulated experiments per cell.
        rng: random generator.
        found: receives the coverages by method and part.

    Yields:
        The lines of the tables.
    """
    columns = list(product(((0.05, 0.97), (0.3, 0.9), (0.8, 0.8)), CORRELATIONS))
    yield "Unsafe and safe test images together, new concepts of either kind. Columns: accuracies on unsafe, on safe"
    yield "images; correlation. The second run is .02 better on both."
    yield ""
    yield header("questions per image", "what", *(f"{u:g}, {s:g}; {c:g}" for (u, s), c in columns))
    for questions in (1, 5):
        cells = np.array([repeat(repetitions, both_sides, *p, c, questions, 0.02, rng) for p, c in columns])
        for method, what, of in (
            (BY_CONCEPT, "share", cells[:, :2]),
            (differences.SHARES_BY_CONCEPT, "difference", cells[:, 2:]),
        ):
            found[method, OVERALL] += of[:, 0].tolist()
            yield f"| {questions} | {what} | " + " | ".join(map(cell, of)) + " |"
