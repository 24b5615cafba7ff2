"""The intervals of the differences between two runs on the same questions."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from safervlm.statistics import differences
from safervlm.statistics.differences import difference_of_items, difference_of_shares, difference_of_sums_of_means
from safervlm.statistics.intervals import strata_of
from simulations.designs import ALIKE, BETWEEN, CORRELATIONS, PAIRED, SKEWED, SKEWS, WITHIN_IMAGE, categories_of
from simulations.studies import Floats, Found, cell, header, held, rates, repeat, skewed
from simulations.sums import TASKS, accuracies, mme, mme_mean


def answers_of_two(
    by_image: tuple[Floats, Floats], questions: int, alike: float, rng: np.random.Generator
) -> list[Floats]:
    """Simulates the responses of two runs to the same questions.

    Args:
        by_image: accuracy on each image, of each run.
        questions: number of questions per image.
        alike: probability that both runs share the random number of a question.
        rng: random generator.

    Returns:
        For each run (images, questions) ones where the response is correct.
    """
    shape = (len(by_image[0]), questions)
    together, shared = rng.random(shape) < alike, rng.random(shape)
    return [(np.where(together, shared, rng.random(shape)) < rate[:, None]).astype(float) for rate in by_image]


def share_difference(
    sizes: Sequence[int],
    first: float,
    second: float,
    correlation: float,
    rng: np.random.Generator,
    between: float = 0.0,
    skew: str = "",
) -> tuple[float, float]:
    """Simulates the interval of the difference of two runs' shares, clustered by concept within categories.

    The runs share the quantile of each category and concept (a concept that is hard for one run is hard for the other),
    and with probability 1/2 the random number of an image.

    Args:
        sizes: number of images of each concept.
        first: mean accuracy of the first run.
        second: mean accuracy of the second run.
        correlation: intra-concept correlation.
        rng: random generator.
        between: share of the concepts' variance that lies between categories.
        skew: one of :data:`SKEWS` instead of a beta distribution, whose correlation is not used.

    Returns:
        Coverage and length.
    """
    concepts, categories = np.repeat(np.arange(len(sizes)), sizes), categories_of(len(sizes))
    quantiles, of_category = rng.random(len(sizes)), rng.random(categories.max() + 1)
    means, by_concept = [], []
    for accuracy in (first, second):
        means.append(rates(of_category, accuracy, between * correlation)[categories])
        rest = correlation * (1 - between) / (1 - between * correlation)
        by_concept.append(skewed(quantiles, accuracy, skew) if skew else rates(quantiles, means[-1], rest))
    by_image = (by_concept[0][concepts], by_concept[1][concepts])
    base, run = (right[:, 0] for right in answers_of_two(by_image, 1, 0.5, rng))
    strata = strata_of(np.zeros(len(sizes), int), categories)
    found = difference_of_shares(np.bincount(concepts, run - base), np.asarray(sizes, float), strata)
    return held(found, float(np.average(means[1] - means[0], weights=sizes)))


def alike_difference(
    images: int, questions: int, first: float, second: float, alike: float, rng: np.random.Generator
) -> tuple[float, ...]:
    """Simulates the intervals of the difference of two runs' shares for independent images.

    Args:
        images: number of images.
        questions: number of questions per image.
        first: mean accuracy of the first run.
        second: mean accuracy of the second run.
        alike: see :func:`answers_of_two`.
        rng: random generator.

    Returns:
        Coverage and length of the interval clustered by image, then of Tango's by item (NaN for several questions).
    """
    quantiles = rng.random(images)
    correlation = WITHIN_IMAGE if questions > 1 else 0.0
    by_image = (rates(quantiles, first, correlation), rates(quantiles, second, correlation))
    base, run = (right.sum(axis=1) for right in answers_of_two(by_image, questions, alike, rng))
    clustered = held(difference_of_shares(run - base, np.full(images, float(questions))), second - first)
    if questions > 1:
        return *clustered, np.nan, np.nan
    tango = difference_of_items(int((run < base).sum()), int((run > base).sum()), images)
    return *clustered, *held(tango, second - first)


def sum_difference(
    tasks: Sequence[int], first: float, second: float, alike: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Simulates the interval of the difference of two runs' sums of means (MME).

    Args:
        tasks: number of images of each task.
        first: accuracy of the first run, see :func:`accuracies`.
        second: accuracy of the second run.
        alike: see :func:`answers_of_two`.
        rng: random generator.

    Returns:
        Coverage and length.
    """
    strata = np.repeat(np.arange(len(tasks)), tasks)
    quantiles = rng.random(len(strata))
    by_task = [accuracies(tasks, accuracy, 1.0) for accuracy in (first, second)]
    by_image = (rates(quantiles, by_task[0][strata], 0.3), rates(quantiles, by_task[1][strata], 0.3))
    base, run = (mme(right.sum(axis=1).astype(int)) for right in answers_of_two(by_image, 2, alike, rng))
    truth = mme_mean(by_task[1], 0.3).sum() - mme_mean(by_task[0], 0.3).sum()
    return held(difference_of_sums_of_means(run - base, strata), truth)


def runs(repetitions: int, rng: np.random.Generator, found: Found) -> Iterator[str]:
    """Simulates the intervals of the differences between two runs.

    Args:
        repetitions: number of simulated experiments per cell.
        rng: random generator.
        found: receives the coverages by method and part.

    Yields:
        The lines of the tables.
    """
    pairs = ((0.3, 0.9), (0.5, 0.8), (0.8, 0.8), (0.95, 0.97), (0.97, 0.97))
    yield "The difference between two runs on the same questions, one per image: accuracy of the one, of the other."
    yield ""
    yield header("clusters", "accuracies", *(f"correlation {c:g}" for c in CORRELATIONS))
    for (part, name, sizes, _), (first, second) in product(PAIRED, pairs):
        cells = [repeat(repetitions, share_difference, sizes, first, second, c, rng) for c in CORRELATIONS]
        found[differences.SHARES_BY_CONCEPT, part] += [values[0] for values in cells]
        yield f"| {name} | {first:g}, {second:g} | " + " | ".join(map(cell, cells)) + " |"
    yield ""
    yield "The same where categories differ (share of the variance between concepts, correlation .3), and for skewed"
    yield "concepts."
    yield ""
    yield header("clusters", "accuracies", *(f"between categories {b:g}" for b in BETWEEN), *SKEWS)
    for (part, name, sizes, _), (first, second) in product(PAIRED[:2], pairs):
        cells = [repeat(repetitions, share_difference, sizes, first, second, 0.3, rng, b) for b in BETWEEN]
        hard = [repeat(repetitions, share_difference, sizes, first, second, 0.0, rng, 0.0, s) for s in SKEWS]
        found[differences.SHARES_BY_CONCEPT, part] += [values[0] for values in cells]
        found[differences.SHARES_BY_CONCEPT, SKEWED] += [values[0] for values in hard]
        yield f"| {name} | {first:g}, {second:g} | " + " | ".join(map(cell, cells + hard)) + " |"
    yield ""
    yield "The same for images without concepts, clustered by image, and for items of one question each (Tango)."
    yield "Columns: accuracies, and the probability that both runs share a question's random effect."
    yield ""
    columns = list(product((*pairs, (0.99, 0.99)), (0.5, 0.9)))
    yield header("images", "questions per image", "method", *(f"{a:g}, {b:g}; {alike:g}" for (a, b), alike in columns))
    for images, questions in product((100, 1000), (1, 5)):
        cells = np.array(
            [repeat(repetitions, alike_difference, images, questions, *p, alike, rng) for p, alike in columns]
        )
        found[differences.SHARES_BY_IMAGE, ALIKE] += cells[:, 0].tolist()
        yield f"| {images} | {questions} | by image | " + " | ".join(cell(x[:2], 3) for x in cells) + " |"
        if questions == 1:
            found[differences.SHARES_BY_ITEM, ALIKE] += cells[:, 2].tolist()
            yield f"| {images} | {questions} | by item | " + " | ".join(cell(x[2:], 3) for x in cells) + " |"
    yield ""
    yield "The difference of two runs' sums of means (MME; tasks +-1, the two responses of an image correlated by .3)."
    yield "Columns as before."
    yield ""
    yield header("tasks", *(f"{a:g}, {b:g}; {alike:g}" for (a, b), alike in columns))
    for name, tasks in TASKS.items():
        cells = [repeat(repetitions, sum_difference, tasks, *p, alike, rng) for p, alike in columns]
        found[differences.SUMS_BY_TASK, name] += [values[0] for values in cells]
        yield f"| {name} | " + " | ".join(cell(x, 0) for x in cells) + " |"
