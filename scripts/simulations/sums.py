"""The intervals of MME's sums of means."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from safervlm.statistics import intervals
from safervlm.statistics.intervals import interval_sum_of_means
from simulations.studies import Floats, Found, cell, header, held, rates, repeat

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
    yield "MME: sums of the tasks' means, at most 200 per task. Columns: accuracy, and the tasks' deviation from it (on"
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
