"""The intervals of the modality gap."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from safervlm.statistics import differences
from safervlm.statistics.intervals import interval_paired
from simulations.designs import CORRELATIONS, PAIRED, categories_of
from simulations.studies import Found, cell, header, held, rates, repeat


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
