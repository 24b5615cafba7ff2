"""Krippendorff's alpha: published examples, and an independent implementation."""

import krippendorff
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


@pytest.mark.parametrize(("text", "published"), [(FOUR, 0.743), (THREE, 0.691)])
def test_published_examples(text: str, published: float) -> None:
    assert krippendorff_alpha(table(text)) == pytest.approx(published, abs=5e-4)


def test_krippendorff_alpha_matches_the_krippendorff_package() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(MISSING, 3, (4, 15))
        theirs = krippendorff.alpha(np.where(labels == MISSING, np.nan, labels), level_of_measurement="nominal")
        assert krippendorff_alpha(labels) == pytest.approx(theirs)


def test_krippendorff_alpha_is_1_for_equal_labels_and_nan_when_undefined() -> None:
    assert krippendorff_alpha(np.array([[0, 1, 2], [0, 1, 2]])) == 1
    for nothing in ([[0, 0], [0, 0]], [[0, MISSING], [MISSING, 1]], [[], []]):
        assert np.isnan(krippendorff_alpha(np.array(nothing, int)))
