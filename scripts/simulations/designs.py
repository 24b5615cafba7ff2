"""The simulated designs: the clusters of the real datasets, accuracies and correlations."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from safervlm.statistics import intervals

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


def categories_of(concepts: int) -> npt.NDArray[np.integer]:
    """Returns the category of each concept: those of UnsafeConcepts, the pictograms' nine of three, else a single one.

    Args:
        concepts: number of concepts.
    """
    if concepts == sum(map(len, IMAGES.values())):
        return np.repeat(np.arange(len(IMAGES)), [len(sizes) for sizes in IMAGES.values()])
    return np.arange(concepts) // 3 if concepts == 27 else np.zeros(concepts, int)
