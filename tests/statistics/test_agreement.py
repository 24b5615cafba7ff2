"""Krippendorff's alpha: published examples, and disagreements counted pair by pair."""

from itertools import combinations

import numpy as np
import pytest

from safervlm.statistics.agreement import MISSING, krippendorff_alpha

# Krippendorff (2011), section C: four observers, twelve units. Nominal: .743.
FOUR = """1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 ."""
# Three coders, fifteen units. Nominal: .691.
THREE = """. . . . . 3 4 1 2 1 1 3 3 . 3
1 . 2 1 3 3 4 3 . . . . . . .
. . 2 1 3 4 4 . 2 1 1 3 3 . 4"""


def table(text: str) -> np.ndarray:
    return np.array([[MISSING if mark == "." else int(mark) for mark in line.split()] for line in text.splitlines()])


def by_pairs(labels: np.ndarray) -> float:
    """1 - the weighted share of differing pairs within units / the share of differing pairs of all labels."""
    observed, pooled = 0.0, []
    for unit in labels.T:
        given = [label for label in unit.tolist() if label != MISSING]
        if len(given) > 1:
            observed += 2 * sum(a != b for a, b in combinations(given, 2)) / (len(given) - 1)
            pooled += given
    expected = 2 * sum(a != b for a, b in combinations(pooled, 2)) / (len(pooled) - 1)
    return 1 - observed / expected


@pytest.mark.parametrize(("text", "published"), [(FOUR, 0.743), (THREE, 0.691)])
def test_published_examples(text: str, published: float) -> None:
    assert krippendorff_alpha(table(text)) == pytest.approx(published, abs=5e-4)


def test_by_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(MISSING, 3, (4, 15))
        assert krippendorff_alpha(labels) == pytest.approx(by_pairs(labels))


def test_ends() -> None:
    assert krippendorff_alpha(np.array([[0, 1, 2], [0, 1, 2]])) == 1
    for nothing in ([[0, 0], [0, 0]], [[0, MISSING], [MISSING, 1]], [[], []]):
        assert np.isnan(krippendorff_alpha(np.array(nothing, int)))
