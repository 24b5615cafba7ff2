"""The paper's split of the unsafe and the safe dataset, as row numbers."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from safervlm.protocol import SPLIT_SEED, TRAIN_FRACTION


class Split(NamedTuple):
    """Row numbers of a dataset's images, in the order in which they are used.

    Attributes:
        train: Training images, without the validation split.
        validation: Images held out of the paper's training images.
        test: Test images.
        unused: Images of the safe dataset that remain after each split is cut to the size of the unsafe split.
    """

    train: list[int]
    validation: list[int]
    test: list[int]
    unused: list[int]


def published_order(concepts: Sequence[str]) -> Iterator[tuple[list[int], int]]:
    """Reproduces the paper's shuffle of the unsafe dataset, concept by concept.

    A ``random.Random`` is seeded with 2024. For each concept in sorted order, its images in dataset order are shuffled
    once; the first ``int(0.8 * n)`` of n are training images, the others test images.

    Args:
        concepts: Concept of each image, in dataset order.

    Yields:
        The shuffled row numbers of a concept, and how many of them are training images.
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
    """Computes the paper's split of the unsafe dataset (see :func:`published_order`).

    The last ``int(validation_fraction * m)`` of a concept's m shuffled training images are its validation images (the
    paper has none).

    Args:
        concepts: Concept of each image, in dataset order.
        validation_fraction: Fraction of the training images to hold out.

    Returns:
        The split, with rows in ascending order. ``unused`` is empty.
    """
    split = Split([], [], [], [])
    for rows, training in published_order(concepts):
        kept = training - int(validation_fraction * training)
        split.train.extend(rows[:kept])
        split.validation.extend(rows[kept:training])
        split.test.extend(rows[training:])
    return Split(*map(sorted, split))


def safe_split(images: int, unsafe: Split, validation_fraction: float = 0.0) -> Split:
    """Computes the paper's split of the safe dataset.

    All n rows, in dataset order, are shuffled once by a ``random.Random`` seeded with 2024. The first ``int(0.8 * n)``
    are training images, the others test images. Each split is cut to the size of the unsafe split. The last
    ``int(validation_fraction * m)`` of the m training images are the validation split (the paper has none).

    Args:
        images: Number of images in the safe dataset.
        unsafe: Split of the unsafe dataset.
        validation_fraction: Fraction of the training images to hold out.

    Returns:
        The split, with rows in shuffled order.
    """
    rows = list(range(images))
    random.Random(SPLIT_SEED).shuffle(rows)
    training = int(TRAIN_FRACTION * images)
    size = min(training, len(unsafe.train) + len(unsafe.validation))
    kept = size - int(validation_fraction * size)
    test = training + len(unsafe.test)
    return Split(rows[:kept], rows[kept:size], rows[training:test], rows[size:training] + rows[test:])
