"""The paper's split of the unsafe set and of the safe set, as row numbers."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from safervlm.protocol import SPLIT_SEED, TRAIN_FRACTION


class Split(NamedTuple):
    """Row numbers of a set's images, in the order in which they are used.

    Attributes:
        train: the training images, without the validation part.
        validation: held out of the paper's training images.
        test: the test images.
        unused: of the safe set, what is over when each part is cut to the unsafe part's size.
    """

    train: list[int]
    validation: list[int]
    test: list[int]
    unused: list[int]


def published_order(concepts: Sequence[str]) -> Iterator[tuple[list[int], int]]:
    """The paper's shuffle of the unsafe set, concept by concept.

    Python's random, seeded with 2024; for each concept in sorted order, its images in data-set order are shuffled once
    and the first ``int(0.8 * n)`` are training images, the rest test images.

    Args:
        concepts: of each image, in data-set order.

    Yields:
        A concept's shuffled row numbers, and how many of them are training images.
    """
    generator = random.Random(SPLIT_SEED)
    images = defaultdict(list)
    for row, concept in enumerate(concepts):
        images[concept].append(row)
    for concept in sorted(images):
        rows = images[concept]
        generator.shuffle(rows)
        yield rows, int(TRAIN_FRACTION * len(rows))


def paper_split(concepts: Sequence[str], validation_fraction: float = 0.0) -> Split:
    """The paper's split of the unsafe set (:func:`published_order`).

    The last ``int(validation_fraction * m)`` of a concept's m shuffled training images are its validation part (the
    paper has none).

    Args:
        concepts: of each image, in data-set order.
        validation_fraction: of the training images.

    Returns:
        Each part in ascending order.
    """
    split = Split([], [], [], [])
    for rows, training in published_order(concepts):
        kept = training - int(validation_fraction * training)
        split.train.extend(rows[:kept])
        split.validation.extend(rows[kept:training])
        split.test.extend(rows[training:])
    return Split(*map(sorted, split))


def safe_split(images: int, unsafe: Split, validation_fraction: float = 0.0) -> Split:
    """The paper's split of the safe set.

    The whole list, in data-set order, is shuffled once by Python's random seeded with 2024; the first ``int(0.8 * n)``
    are training images; each part is cut to the unsafe part's size. The last ``int(validation_fraction * m)`` of the m
    training images are the validation part (the paper has none).

    Args:
        images: how many the safe set has.
        unsafe: the unsafe set's split.
        validation_fraction: of the training images.

    Returns:
        Each part in shuffled order.
    """
    rows = list(range(images))
    random.Random(SPLIT_SEED).shuffle(rows)
    training = int(TRAIN_FRACTION * images)
    size = min(training, len(unsafe.train) + len(unsafe.validation))
    kept = size - int(validation_fraction * size)
    test = training + len(unsafe.test)
    return Split(rows[:kept], rows[kept:size], rows[training:test], rows[size:training] + rows[test:])
