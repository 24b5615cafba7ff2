"""The intervals of LLaVABench's ratios and of their differences."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from scipy.special import ndtr

from safervlm.statistics import differences, intervals
from safervlm.statistics.differences import difference_of_ratios
from safervlm.statistics.intervals import interval_ratio
from simulations.designs import OVERALL
from simulations.studies import Floats, Found, cell, header, held, repeat

# LLaVABench: 60 questions about 24 images; questions per image, and mean and standard deviation of scores from 1 to 10.
QUESTIONS: dict[str, Sequence[int]] = {
    "2 or 3": [2] * 12 + [3] * 12,
    "1 to 4": [1] * 4 + [2] * 8 + [3] * 8 + [4] * 4,
}
SCORES = ((3.0, 2.5), (6.0, 2.0), (8.0, 1.5), (9.5, 1.0))
REFERENCES = ((8.0, 1.0), (9.8, 0.4))


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
        scores(*what, 0.5**0.5 * shared + 0.5**0.5 * own_part, of_image, correlation)
        for what, own_part in zip((model, reference, base, reference), own, strict=True)
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
    yield header("questions per image", "reference", "what", *(f"{m:g} +-{d:g}, {c:g}" for (m, d), c in columns))
    for (name, questions), reference in product(QUESTIONS.items(), REFERENCES):
        cells = np.array([repeat(repetitions, ratio, questions, model, reference, c, rng) for model, c in columns])
        found[intervals.RATIO_BY_IMAGE, OVERALL] += cells[:, 0].tolist()
        found[differences.RATIOS_BY_IMAGE, OVERALL] += cells[:, 2].tolist()
        about = f"| {name} | {reference[0]:g} +-{reference[1]:g} | "
        yield about + "ratio | " + " | ".join(cell(x[:2]) for x in cells) + " |"
        yield about + "difference | " + " | ".join(cell(x[2:]) for x in cells) + " |"
