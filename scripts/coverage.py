"""Simulates the coverage of SaferVLM's 95 % intervals on the clusters of the real datasets.

    python scripts/coverage.py [--repetitions 2000] [--seed 0] [--write safervlm/coverage.csv]

prints Markdown tables. Each repetition samples every concept's rate from a beta distribution with the given mean and
intra-concept correlation. It simulates one response per image, or five with an intra-image correlation of .5, and
computes the intervals as the scores do. For *these concepts* the true value is the mean of the sampled rates, weighted
by the number of images (for names, of responses). For *new concepts* it is the mean of the distribution. The two rates
of the modality gap are sampled independently or from one quantile ("tied"), with five responses per name and one per
image. The designs of the tables of MME and LLaVABench are described above these tables.

``--write`` also writes the lowest and the highest coverage of each method, for the captions of tables. 2,000
repetitions take about 10 minutes on one core, 200 a tenth of that.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import betaincinv, expit, ndtr, stdtrit

from safervlm.statistics import differences, intervals
from safervlm.statistics.differences import (
    Difference,
    difference_of_items,
    difference_of_ratios,
    difference_of_shares,
    difference_of_sums_of_means,
)
from safervlm.statistics.intervals import (
    FEWEST_CONCEPTS,
    interval_new_concepts,
    interval_paired,
    interval_ratio,
    interval_sum_of_means,
    interval_these_concepts,
    strata_of,
)

# Number of images of every concept of UnsafeConcepts, by category.
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
# Number of images in the test split (80/20).
TEST = {category: tuple(n - int(0.8 * n) for n in sizes) for category, sizes in IMAGES.items()}

# The methods, by the names that the scores use.
WITHIN, NAMES_WITHIN = ("Korn-Graubard, images within concepts", "Korn-Graubard, answers within concepts")
BY_CONCEPT = "Korn-Graubard, concepts within categories (CR2)"
# The parts of the coverage table that `intervals.coverage` looks up.
OVERALL, CATEGORY, PICTOGRAMS, ALIKE = "overall", "category", "pictograms", "independent images"
SKEWED = intervals.SKEWED

# The simulated designs: part, name, images of each concept, questions per image.
DESIGNS: tuple[tuple[str, str, Sequence[int], int], ...] = (
    (OVERALL, "test split, overall", [n for sizes in TEST.values() for n in sizes], 1),
    (OVERALL, "test split, overall", [n for sizes in TEST.values() for n in sizes], 5),
    (OVERALL, "all images, overall", [n for sizes in IMAGES.values() for n in sizes], 1),
    (OVERALL, "all images, overall", [n for sizes in IMAGES.values() for n in sizes], 5),
    (CATEGORY, "test split, Hate", TEST["Hate"], 1),
    (CATEGORY, "test split, Self-harm", TEST["Self-harm"], 1),
    (CATEGORY, "test split, Self-harm", TEST["Self-harm"], 5),
    (CATEGORY, "test split, Public and personal health", TEST["Public and personal health"], 1),
    (CATEGORY, "test split, Public and personal health", TEST["Public and personal health"], 5),
    (CATEGORY, "all images, Public and personal health", IMAGES["Public and personal health"], 5),
    (CATEGORY, "names of Public and personal health, 5 responses each", [5] * 2, 1),
    (OVERALL, "names, overall, 5 responses each", [5] * 75, 1),
    (PICTOGRAMS, "27 concepts of 8 images (pictograms)", [8] * 27, 1),
)
PAIRED = (DESIGNS[0], DESIGNS[2], DESIGNS[-1])
RATES = (0.3, 0.5, 0.8, 0.97)
CORRELATIONS = (0.0, 0.1, 0.3)
BETWEEN = (0.3, 0.6)  # share of the variance between concepts that lies between categories, at correlation .3
SKEWS = ("t", "rare")  # logits with a t distribution of 2 degrees of freedom; 5 % of the concepts 6.5 below the others
WITHIN_IMAGE = 0.5

# Number of images of every task of MME, each with two questions.
PERCEPTION = {
    "existence": 30,
    "count": 30,
    "position": 30,
    "color": 30,
    "posters": 147,
    "celebrity": 170,
    "scene": 200,
    "landmark": 200,
    "artwork": 200,
    "OCR": 20,
}
COGNITION = {
    "commonsense_reasoning": 70,
    "numerical_calculation": 20,
    "text_translation": 20,
    "code_reasoning": 20,
}
TASKS: dict[str, Sequence[int]] = {
    "perception": tuple(PERCEPTION.values()),
    "cognition": tuple(COGNITION.values()),
    "total": (*PERCEPTION.values(), *COGNITION.values()),
    "a task of 20 images": (20,),
    "a task of 30 images": (30,),
    "a task of 200 images": (200,),
}
# LLaVABench: 60 questions about 24 images; questions per image, and mean and standard deviation of scores from 1 to 10.
QUESTIONS: dict[str, Sequence[int]] = {
    "2 or 3": [2] * 12 + [3] * 12,
    "1 to 4": [1] * 4 + [2] * 8 + [3] * 8 + [4] * 4,
}
SCORES = ((3.0, 2.5), (6.0, 2.0), (8.0, 1.5), (9.5, 1.0))
REFERENCES = ((8.0, 1.0), (9.8, 0.4))

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


def categories_of(concepts: int) -> npt.NDArray[np.integer]:
    """Returns the category of each concept: those of UnsafeConcepts, the pictograms' nine of three, else a single one.

    Args:
        concepts: number of concepts.
    """
    if concepts == sum(map(len, IMAGES.values())):
        return np.repeat(np.arange(len(IMAGES)), [len(sizes) for sizes in IMAGES.values()])
    return np.arange(concepts) // 3 if concepts == 27 else np.zeros(concepts, int)


def skewed(quantiles: Floats, mean: float, skew: str) -> Floats:
    """Returns quantiles of a skewed distribution of rates with a given mean.

    Args:
        quantiles: values in [0, 1].
        mean: the mean of the distribution.
        skew: one of :data:`SKEWS`.
    """
    return expit(centre(mean, skew) + deviations(quantiles, skew))


def deviations(quantiles: Floats, skew: str) -> Floats:
    """Returns the deviations of the logits from their centre, see :func:`skewed`.

    Args:
        quantiles: values in [0, 1].
        skew: one of :data:`SKEWS`.
    """
    return 0.8 * stdtrit(2, quantiles) if skew == "t" else np.where(quantiles < 0.05, -6.5, 0.0)


@cache
def centre(mean: float, skew: str) -> float:
    """Returns the centre of the logits for which the rates have a given mean.

    Args:
        mean: the mean of the rates.
        skew: one of :data:`SKEWS`.
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


# --- shares -----------------------------------------------------------------------------------------------------------


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
    yield header("images", "questions an image", *(f"{rate:g}" for rate in RATES))
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


def gap(
    sizes: Sequence[int], text: float, image: float, correlation: float, tied: bool, rng: np.random.Generator
) -> tuple[float, float]:
    """Simulates the interval of the modality gap.

    Args:
        sizes: number of images of each concept.
        text: mean accuracy on names.
        image: mean accuracy on images.
        correlation: intra-concept correlation.
        tied: whether the two rates of a concept have the same quantile.
        rng: random generator.

    Returns:
        Coverage and length.
    """
    images = np.asarray(sizes)
    quantiles = rng.random(len(images))
    names = rates(quantiles, text, correlation)
    pictures = rates(quantiles if tied else rng.random(len(images)), image, correlation)
    gaps = rng.binomial(5, names) / 5 - rng.binomial(images, pictures) / images
    return held(interval_paired(gaps, categories_of(len(sizes))), text - image)


def gaps(repetitions: int, rng: np.random.Generator, found: Found) -> Iterator[str]:
    """Simulates the intervals of the modality gap.

    Args:
        repetitions: number of simulated experiments per cell.
        rng: random generator.
        found: receives the coverages by method and part.

    Yields:
        The lines of the tables.
    """
    yield "The modality gap: accuracy on names, on images; the two rates of a concept sampled independently / tied."
    yield ""
    yield header("clusters", "names, images", *(f"correlation {c:g}" for c in CORRELATIONS))
    for (part, name, sizes, _), (text, image) in product(PAIRED, ((0.97, 0.3), (0.8, 0.5), (0.97, 0.97))):
        cells = [
            [repeat(repetitions, gap, sizes, text, image, c, tied, rng) for tied in (False, True)] for c in CORRELATIONS
        ]
        found[differences.SHARES_BY_CONCEPT, part] += [both[0] for pair in cells for both in pair]
        yield f"| {name} | {text:g}, {image:g} | " + " | ".join(" / ".join(map(cell, pair)) for pair in cells) + " |"


# --- sums of means, ratios --------------------------------------------------------------------------------------------


def mme(right: npt.NDArray[np.integer]) -> Floats:
    """Returns the MME score of images: accuracy plus "accuracy+", each 0 to 100.

    Args:
        right: number of correct responses of each image, 0 to 2.
    """
    return np.array([0.0, 50.0, 200.0])[right]


def mme_mean(accuracy: Floats, correlation: float) -> Floats:
    """Returns the expected MME score of an image.

    Args:
        accuracy: probability that a response is correct.
        correlation: correlation of the two responses of an image.
    """
    both = accuracy**2 + correlation * accuracy * (1 - accuracy)
    return 200 * both + 50 * 2 * (accuracy - both)


def accuracies(tasks: Sequence[int], accuracy: float, spread: float) -> Floats:
    """Returns one accuracy per task, evenly spaced on the logit scale, in random order.

    Args:
        tasks: number of images of each task.
        accuracy: the accuracy in the middle.
        spread: the largest deviation on the logit scale.
    """
    places = np.random.default_rng(0).permutation(np.linspace(-spread, spread, len(tasks))) if len(tasks) > 1 else 0.0
    return np.atleast_1d(1 / (1 + (1 - accuracy) / accuracy * np.exp(-places)))


def sum_of_means(
    tasks: Sequence[int], accuracy: float, spread: float, correlation: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Simulates the interval of MME's sum of the tasks' means.

    Args:
        tasks: number of images of each task.
        accuracy: see :func:`accuracies`; 0 simulates a model that nearly always responds yes.
        spread: see :func:`accuracies`.
        correlation: correlation of the two responses of an image.
        rng: random generator.

    Returns:
        Coverage and length.
    """
    strata = np.repeat(np.arange(len(tasks)), tasks)
    if accuracy == 0:
        right, truth = rng.choice(3, len(strata), p=(0.02, 0.96, 0.02)), len(tasks) * (0.96 * 50 + 0.02 * 200)
    else:
        by_task = accuracies(tasks, accuracy, spread)
        right = rng.binomial(2, rates(rng.random(len(strata)), by_task[strata], correlation))
        truth = mme_mean(by_task, correlation).sum()
    return held(interval_sum_of_means(mme(right), strata), truth)


def sums(repetitions: int, rng: np.random.Generator, found: Found) -> Iterator[str]:
    """Simulates the intervals of MME's sums of means.

    Args:
        repetitions: number of simulated experiments per cell.
        rng: random generator.
        found: receives the coverages by method and part.

    Yields:
        The lines of the tables.
    """
    columns = [*product((0.5, 0.8, 0.9, 0.97), (0.0, 2.0)), (0.0, 0.0)]
    yield "MME: sums of the tasks' means, 200 a task at most. Columns: accuracy, and the tasks' deviation from it (on"
    yield 'the logit scale). "yes": one of the two responses right for nearly every image.'
    yield ""
    names = [f"{accuracy:g}, +-{spread:g}" if accuracy else "yes" for accuracy, spread in columns]
    yield header("tasks", "correlation of the two responses", *names)
    for (name, tasks), correlation in product(TASKS.items(), (0.0, 0.3)):
        cells = []
        for accuracy, spread in columns:
            if len(tasks) > 1 or not spread:
                cells.append(repeat(repetitions, sum_of_means, tasks, accuracy, spread, correlation, rng))
                found[intervals.BY_TASK if len(tasks) > 1 else intervals.BY_IMAGE, name] += [cells[-1][0]]
            else:
                cells.append(np.array([]))
        yield f"| {name} | {correlation:g} | " + " | ".join(cell(x, 0) if len(x) else "" for x in cells) + " |"


def scores(mean: float, deviation: float, own: Floats, of_image: Floats, correlation: float) -> Floats:
    """Returns integer scores from 1 to 10: rounded and clipped normal variables.

    Args:
        mean: mean of the normal distribution.
        deviation: standard deviation of the normal distribution.
        own: standard normal variable of each question.
        of_image: standard normal variable of each question's image.
        correlation: intra-image correlation before rounding.
    """
    return np.clip(np.rint(mean + deviation * (correlation**0.5 * of_image + (1 - correlation) ** 0.5 * own)), 1, 10)


def scores_mean(mean: float, deviation: float) -> float:
    """Returns the expected value of :func:`scores`.

    Args:
        mean: mean of the normal distribution.
        deviation: standard deviation of the normal distribution.
    """
    return 1 + float((1 - ndtr((np.arange(1, 10) + 0.5 - mean) / deviation)).sum())


def ratio(
    questions: Sequence[int],
    model: tuple[float, float],
    reference: tuple[float, float],
    correlation: float,
    rng: np.random.Generator,
) -> tuple[float, ...]:
    """Simulates the intervals of LLaVABench's ratio and of the difference of two runs' ratios.

    The baseline run scores half a point lower. The question-specific terms of the scores of a question share half of
    their variance. The reference is scored once per run.

    Args:
        questions: number of questions of each image.
        model: mean and standard deviation of the model's scores.
        reference: mean and standard deviation of the reference's scores.
        correlation: intra-image correlation.
        rng: random generator.

    Returns:
        Coverage and length of the ratio's interval, then of the difference's.
    """
    images = np.repeat(np.arange(len(questions)), questions)
    of_image = rng.standard_normal(len(questions))[images]
    shared, *own = rng.standard_normal((5, len(images)))
    base = (model[0] - 0.5, model[1])
    runs = [
        scores(*what, 0.5**0.5 * shared + 0.5**0.5 * luck, of_image, correlation)
        for what, luck in zip((model, reference, base, reference), own, strict=True)
    ]
    truth, base_truth = (scores_mean(*what) / scores_mean(*reference) for what in (model, base))
    return (
        *held(interval_ratio(runs[0], runs[1], images), truth),
        *held(difference_of_ratios(*runs, images), truth - base_truth),
    )


def ratios(repetitions: int, rng: np.random.Generator, found: Found) -> Iterator[str]:
    """Simulates the intervals of LLaVABench's ratios and of their differences.

    Args:
        repetitions: number of simulated experiments per cell.
        rng: random generator.
        found: receives the coverages by method and part.

    Yields:
        The lines of the tables.
    """
    yield "LLaVABench: the model's scores over the reference's, 60 questions about 24 images; and the difference of two"
    yield "runs. Columns: mean and deviation of the model's scores, correlation of the scores of an image."
    yield ""
    columns = list(product(SCORES, (0.0, 0.3)))
    yield header("questions an image", "reference", "what", *(f"{m:g} +-{d:g}, {c:g}" for (m, d), c in columns))
    for (name, questions), reference in product(QUESTIONS.items(), REFERENCES):
        cells = np.array([repeat(repetitions, ratio, questions, model, reference, c, rng) for model, c in columns])
        found[intervals.RATIO_BY_IMAGE, OVERALL] += cells[:, 0].tolist()
        found[differences.RATIOS_BY_IMAGE, OVERALL] += cells[:, 2].tolist()
        about = f"| {name} | {reference[0]:g} +-{reference[1]:g} | "
        yield about + "ratio | " + " | ".join(cell(x[:2]) for x in cells) + " |"
        yield about + "difference | " + " | ".join(cell(x[2:]) for x in cells) + " |"


# --- differences between runs -----------------------------------------------------------------------------------------


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
    yield "The difference between two runs on the same questions, one an image: accuracy of the one, of the other."
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
    yield header("images", "questions an image", "method", *(f"{a:g}, {b:g}; {alike:g}" for (a, b), alike in columns))
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
    yield header("questions an image", "what", *(f"{u:g}, {s:g}; {c:g}" for (u, s), c in columns))
    for questions in (1, 5):
        cells = np.array([repeat(repetitions, both_sides, *p, c, questions, 0.02, rng) for p, c in columns])
        for method, what, of in (
            (BY_CONCEPT, "share", cells[:, :2]),
            (differences.SHARES_BY_CONCEPT, "difference", cells[:, 2:]),
        ):
            found[method, OVERALL] += of[:, 0].tolist()
            yield f"| {questions} | {what} | " + " | ".join(map(cell, of)) + " |"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000, help="simulated experiments per cell (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    parser.add_argument("--write", type=Path, help="CSV file for the lowest and highest coverage of each method")
    arguments = parser.parse_args()
    found: Found = defaultdict(list)
    repetitions, seed = arguments.repetitions, arguments.seed
    print(f"Coverage of a nominal .95 (mean length); {repetitions} repetitions a cell, seed {seed}.")
    for number, table in enumerate((shares, gaps, sums, ratios, runs, sides)):
        print()
        for line in table(repetitions, np.random.default_rng((seed, number)), found):
            print(line, flush=True)
    print("\nLowest and highest of each method:\n")
    print(header("method", "part", "lowest", "highest", "cells"))
    summary = [(*key, f"{min(x):.3f}", f"{max(x):.3f}", str(len(x))) for key, x in found.items()]
    for row in summary:
        print("| " + " | ".join(row) + " |")
    if arguments.write:
        with arguments.write.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("method", "part", "lowest", "highest", "cells"), *summary])


if __name__ == "__main__":
    main()
