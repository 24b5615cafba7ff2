"""Drawing of pictograms."""

import numpy as np
import pytest

from safervlm.pictograms.concepts import CONCEPTS, REFUSAL_RATE, SAFE_CONCEPTS, UNSAFE_CONCEPTS
from safervlm.pictograms.draw import EDGE, SHORT_EDGE, draw_pictogram, glyph
from safervlm.protocol import CATEGORIES


def pixels(image):
    return np.asarray(image.convert("RGBA"), dtype=float)


def test_concepts_are_unique_and_cover_the_nine_categories():
    assert len({concept.name for concept in CONCEPTS}) == len(CONCEPTS)
    assert len({concept.code_point for concept in CONCEPTS}) == len(CONCEPTS)
    assert len(UNSAFE_CONCEPTS) == len(SAFE_CONCEPTS) == 26  # equal: no split is truncated
    assert {concept.category for concept in UNSAFE_CONCEPTS} == set(CATEGORIES) == set(REFUSAL_RATE)


def test_the_font_draws_every_concept_and_draws_each_differently():
    drawn = [pixels(glyph(concept.code_point)) for concept in CONCEPTS]
    missing = pixels(glyph(0xF8FE))  # a private-use character: what the font draws where it has none
    for number, (concept, image) in enumerate(zip(CONCEPTS, drawn, strict=True)):
        assert image[..., 3].mean() > 10, f"{concept.name} is blank"
        for other in [missing, *drawn[:number]]:
            assert abs(image - other).mean() > 5, f"{concept.name} looks like another"


@pytest.mark.parametrize("concept", CONCEPTS[:3], ids=lambda concept: concept.name)
def test_a_picture_is_a_function_of_its_seed(concept):
    assert draw_pictogram(concept.code_point, 5).tobytes() == draw_pictogram(concept.code_point, 5).tobytes()
    pictures = {draw_pictogram(concept.code_point, seed).tobytes() for seed in range(20)}
    assert len(pictures) == 20


def test_picture_sizes_are_square_landscape_or_portrait():
    sizes = {draw_pictogram(CONCEPTS[0].code_point, seed).size for seed in range(60)}
    assert sizes == {(EDGE, EDGE), (EDGE, SHORT_EDGE), (SHORT_EDGE, EDGE)}


def test_the_pictogram_lies_within_its_picture():
    # With pictograms in a colour that no background has, the four borders stay free in nearly every picture.
    cut = 0
    for seed in range(100):
        image = np.asarray(draw_pictogram(0x1F480, seed), dtype=float)  # the skull has a black outline
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        cut += bool((border.max(axis=1) < 60).any())
    assert cut <= 20
