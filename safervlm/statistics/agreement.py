"""Agreement of several raters beyond chance."""

import numpy as np

from safervlm.statistics.intervals import Floats, Numbers

MISSING = -1  # a unit that a rater did not label


def krippendorff_alpha(labels: Numbers) -> float:
    """Computes Krippendorff's alpha of nominal labels.

    It is 1 minus the observed over the expected disagreement of pairs of labels of the same unit: 1 if all raters agree
    everywhere, 0 if they agree as often as by chance. Krippendorff (2011), Computing Krippendorff's Alpha-Reliability.

    Args:
        labels: (raters, units) the label as a number from 0, or :data:`MISSING`.

    Returns:
        Alpha; NaN if no unit has two labels, or if all labels are the same.
    """
    counts = np.array([(labels == label).sum(0) for label in range(int(labels.max(initial=MISSING)) + 1)], np.float64)
    counts = counts.reshape(len(counts), labels.shape[1])
    counts = counts[:, counts.sum(0) >= 2]
    per_unit: Floats = counts.sum(0)
    total, of_label = counts.sum(), counts.sum(1)
    expected = total**2 - (of_label**2).sum()
    if not expected:
        return float("nan")
    observed = ((per_unit**2 - (counts**2).sum(0)) / (per_unit - 1)).sum()
    return float(1 - (total - 1) * observed / expected)
