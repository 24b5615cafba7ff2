"""The intervals of shares: over these concepts, over new concepts, and where concepts are hard."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from safervlm.statistics.intervals import FEWEST_CONCEPTS, interval_new_concepts, interval_these_concepts
from simulations.designs import (
    ALIKE,
    BETWEEN,
    BY_CONCEPT,
    CATEGORY,
    CORRELATIONS,
    DESIGNS,
    NAMES_WITHIN,
    OVERALL,
    RATES,
    SKEWED,
    SKEWS,
    WITHIN,
    WITHIN_IMAGE,
    categories_of,
)
from simulations.studies import Floats, Found, cell, header, held, rates, repeat, skewed


def share(
    sizes: Sequence[int],
    questions: int,
    rate: float,
    correlation: float,
    rng: np.random.Generator,
    between: float = 0.0,
    skew: str = "",
) -> tuple[float, ...]:
    """Simulates the intervals of a share.

    Args:
        sizes: number of images of each concept.
        questions: number of questions per image.
        rate: mean accuracy.
        correlation: intra-concept correlation.
        rng: random generator.
        between: share of the concepts' variance that lies between categories.
        skew: one of :data:`SKEWS` instead of a beta distribution, whose correlation is not used.

    Returns:
        Coverage and length for these concepts and for new concepts; the latter are NaN for fewer than 10 concepts.
    """
    concepts, categories = np.repeat(np.arange(len(sizes)), sizes), categories_of(len(sizes))
    answers = np.full(len(concepts), float(questions))
    quantiles = rng.random(len(sizes))
    if skew:
        means = np.full(len(sizes), rate)
        by_concept = skewed(quantiles, rate, skew)
    else:
        of_category = rates(rng.random(categories.max() + 1), rate, between * correlation)
        means = of_category[categories]
        by_concept = rates(quantiles, means, correlation * (1 - between) / (1 - between * correlation))
    by_image = by_concept[concepts]
    if questions > 1:
        by_image = rates(rng.random(len(concepts)), by_image, WITHIN_IMAGE)
    right = rng.binomial(questions, by_image).astype(float)
    by = (np.bincount(concepts, right), np.bincount(concepts, answers))
    new = interval_new_concepts(*by, categories=categories)
    truth, expected = (float(np.average(of, weights=sizes)) for of in (by_concept, means))
    return *held(interval_these_concepts(right, answers, concepts), truth), *held(new, expected)


def both_units(name: str, questions: int, cells: Floats) -> Iterator[str]:
    """Formats the lines of a design: for these concepts, and for new ones.

    Args:
        name: the design.
        questions: number of questions per image.
        cells: (columns, 4) coverage and mean length for these concepts, then for new ones.

    Yields:
        Two lines of a table.
    """
    for sampling_unit, of in (("these concepts", cells[:, :2]), ("new concepts", cells[:, 2:])):
        yield f"| {name} | {questions} | {sampling_unit} | " + " | ".join(map(cell, of)) + " |"


def shares(repetitions: int, rng: np.random.Generator, found: Found) -> Iterator[str]:
    """Simulates the intervals of shares.

    Args:
        repetitions: number of simulated experiments per cell.
        rng: random generator.
        found: receives the coverages by method and part.

    Yields:
        The lines of the tables.
    """
    columns = list(product(RATES, CORRELATIONS))
    yield "Shares of the responses. Columns: accuracy, intra-concept correlation."
    yield ""
    yield header("clusters", "questions per image", "sampling unit", *(f"{rate:g}, {c:g}" for rate, c in columns))
    for part, name, sizes, questions in DESIGNS:
        cells = np.array([repeat(repetitions, share, sizes, questions, *column, rng) for column in columns])
        found[NAMES_WITHIN if name.startswith("names") else WITHIN, part] += cells[:, 0].tolist()
        yield f"| {name} | {questions} | these concepts | " + " | ".join(cell(x[:2]) for x in cells) + " |"
        if len(sizes) >= FEWEST_CONCEPTS:
            if part != CATEGORY:  # new concepts within a category are not reported
                found[BY_CONCEPT, part] += cells[:, 2].tolist()
            yield f"| {name} | {questions} | new concepts | " + " | ".join(cell(x[2:]) for x in cells) + " |"
    yield ""
    yield "Nearer to 1. Columns as before."
    yield ""
    columns = list(product((0.99,), CORRELATIONS))
    yield header("clusters", "questions per image", "sampling unit", *(f"{rate:g}, {c:g}" for rate, c in columns))
    for part, name, sizes, questions in DESIGNS:
        if part == OVERALL:
            cells = np.array([repeat(repetitions, share, sizes, questions, *column, rng) for column in columns])
            found[NAMES_WITHIN if name.startswith("names") else WITHIN, part] += cells[:, 0].tolist()
            found[BY_CONCEPT, part] += cells[:, 2].tolist()
            yield from both_units(name, questions, cells)
    yield ""
    yield from hard_shares(repetitions, rng, found)
    yield ""
    yield "Images without concepts, as in SMID or NSFW: one concept for all images. Columns: accuracy."
    yield ""
    yield header("images", "questions per image", *(f"{rate:g}" for rate in RATES))
    for images, questions in product((100, 1000), (1, 5)):
        cells = np.array([repeat(repetitions, share, [images], questions, rate, 0.0, rng)[:2] for rate in RATES])
        found[WITHIN, ALIKE] += cells[:, 0].tolist()
        yield f"| {images} | {questions} | " + " | ".join(map(cell, cells)) + " |"


def hard_shares(repetitions: int, rng: np.random.Generator, found: Found) -> Iterator[str]:
    """Simulates the intervals of shares where categories differ, and where few concepts make the errors.

    Args:
        repetitions: number of simulated experiments per cell.
        rng: random generator.
        found: receives the coverages by method and part.

    Yields:
        The lines of the tables.
    """
    designs = [design for design in DESIGNS if design[0] == OVERALL and not design[1].startswith("names")]
    yield "Categories differ. Columns: accuracy, share of the variance between concepts (correlation .3) that lies"
    yield "between categories."
    yield ""
    columns: list[tuple[float, Any]] = list(product(RATES, BETWEEN))
    yield header("clusters", "questions per image", "sampling unit", *(f"{rate:g}, {b:g}" for rate, b in columns))
    for part, name, sizes, questions in designs:
        cells = np.array([repeat(repetitions, share, sizes, questions, r, 0.3, rng, b) for r, b in columns])
        found[WITHIN, part] += cells[:, 0].tolist()
        found[BY_CONCEPT, part] += cells[:, 2].tolist()
        yield from both_units(name, questions, cells)
    yield ""
    yield "Skewed concepts. Columns: accuracy; t: logits with a t distribution of 2 degrees of freedom, rare: 5 % of"
    yield "the concepts 6.5 below the others."
    yield ""
    columns = list(product(RATES, SKEWS))
    yield header("clusters", "questions per image", "sampling unit", *(f"{rate:g}, {s}" for rate, s in columns))
    for _, name, sizes, questions in designs:
        cells = np.array([repeat(repetitions, share, sizes, questions, r, 0.0, rng, 0.0, s) for r, s in columns])
        found[WITHIN, SKEWED] += cells[:, 0].tolist()
        found[BY_CONCEPT, SKEWED] += cells[:, 2].tolist()
        yield from both_units(name, questions, cells)
