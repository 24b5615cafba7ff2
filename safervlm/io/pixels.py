"""Conversion of decoded images of any mode to 8 bits per channel in sRGB, as an image viewer shows them.

Shapes: H rows and W columns of an image.
"""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# Mode of an image -> colour space that its ICC profile must have.
PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
# A profile that changes no channel by more than this many of 255 levels is treated as sRGB.
SRGB_TOLERANCE = 2


class UnsupportedPixelsError(ValueError):
    """Raised if the pixel values of an image do not determine colours."""


@dataclass(frozen=True)
class Encoding:
    """Encoding of the pixel values of an image file, beyond Pillow's mode.

    Attributes:
        bits: Bits per channel.
        signed: Whether integers are signed.
        white_is_zero: Whether 0 is white in an image with more than 8 bits (Pillow inverts the others itself).
        profile: ICC profile; empty for none.
    """

    bits: int = 8
    signed: bool = False
    white_is_zero: bool = False
    profile: bytes = b""


def to_srgb(image: Image.Image, encoding: Encoding, background: tuple[int, int, int]) -> Image.Image:
    """Converts an image to mode RGB: more than 8 bits scaled, colours converted to sRGB, transparency composited.

    Args:
        image: Loaded image of any mode that Pillow's decoders return.
        encoding: Encoding of the file's pixel values.
        background: Colour behind transparent pixels: red, green and blue, 0 to 255.

    Raises:
        UnsupportedPixelsError: The values can't be interpreted: signed integers, or floating point beyond 0 to 1.
    """
    if encoding.signed:
        raise UnsupportedPixelsError("its values are signed integers")
    colours, alpha = split_alpha(image, encoding)
    if colours.mode not in PROFILE_SPACES:
        colours = lab_to_srgb(colours) if colours.mode == "LAB" else colours.convert("RGB")
    elif encoding.profile and (transform := profile_transform(encoding.profile, colours.mode)) is not None:
        colours = transform.apply(colours)
    colours = colours.convert("RGB")
    if alpha is None:
        return colours
    composite = Image.new("RGB", image.size, background)
    composite.paste(colours, mask=alpha)
    return composite


def split_alpha(image: Image.Image, encoding: Encoding) -> tuple[Image.Image, Image.Image | None]:
    """Splits an image into its colours and its opacity.

    Args:
        image: Loaded image of any mode that Pillow's decoders return.
        encoding: Encoding of the file's pixel values.

    Returns:
        The colours with 8 bits per channel, and the opacity in mode L; None if every pixel is opaque.

    Raises:
        UnsupportedPixelsError: The values can't be interpreted.
    """
    transparent = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        alpha = None if transparent is None else Image.fromarray(((values != transparent) * 255).astype(np.uint8))
        return Image.fromarray(eight_bits(values, encoding)), alpha
    if image.mode in ("1", "L", "RGB") and transparent is not None:
        if encoding.bits > 8:
            raise UnsupportedPixelsError("one of its colours with 16 bits per channel is transparent")
        if image.mode == "L" and encoding.bits < 8:  # the value in the file; Pillow scaled the pixels to 8 bits
            transparent = int(transparent) * 255 // (2**encoding.bits - 1)
        colours = image.convert("L") if image.mode == "1" else image
        equal = np.asarray(colours) == np.asarray(transparent)
        opaque = ~(equal if colours.mode == "L" else equal.all(-1))
        return colours, Image.fromarray((opaque * 255).astype(np.uint8))
    if image.mode == "La":  # the file has grey values multiplied by the opacity
        image = image.convert("LA")
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return image.convert("RGB"), image.getchannel("A")
    return (image.convert({"1": "L", "P": "RGB"}[image.mode]) if image.mode in ("1", "P") else image), None


def eight_bits(values: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Scales grey values of more than 8 bits to 8 bits, such that black and white are preserved.

    Args:
        values: (H, W) integers, or floating point from 0 to 1.
        encoding: Number of bits, and whether 0 is white.

    Returns:
        (H, W) uint8, 0 to 255. For integers these are the highest 8 bits, as Pillow keeps them of 16-bit colours.

    Raises:
        UnsupportedPixelsError: The values are floating point beyond 0 to 1, for which no black and white are defined.
    """
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also True if one of them is NaN
            raise UnsupportedPixelsError(f"its floating-point values go from {low:g} to {high:g}, not from 0 to 1")
        grey = np.rint(values * 255).astype(np.uint8)
    else:
        unsigned = values.view(np.uint32) if values.dtype == np.int32 else values
        grey = (unsigned >> (encoding.bits - 8)).astype(np.uint8)
    return 255 - grey if encoding.white_is_zero else grey


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """Converts CIE L*a*b* (D50) to sRGB, which Pillow's ``convert`` does not support.

    Args:
        image: Image in mode LAB.
    """
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    # NOOPTIMIZE: the interpolation in a precomputed table is off by up to 15 levels at the edge of the gamut.
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB", flags=ImageCms.Flags.NOOPTIMIZE).apply(image)


@lru_cache(maxsize=16)
def profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the conversion from an ICC profile's colours to sRGB, by perceptual intent, as in browsers.

    Args:
        profile: ICC profile.
        mode: Mode of the image: RGB, L or CMYK.

    Returns:
        None if nothing is to be converted: the profile is sRGB, is damaged, or has another colour space than the image.
        Viewers then show the values unchanged.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != PROFILE_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    grid = np.arange(0, 256, 15).astype(np.uint8)  # 18 values per channel, including black and white
    probe = Image.fromarray(
        grid[None] if mode == "L" else np.stack(np.meshgrid(grid, grid, grid), -1).reshape(1, -1, 3)
    )
    change = np.asarray(transform.apply(probe), int) - np.asarray(probe.convert("RGB"), int)
    return None if abs(change).max() <= SRGB_TOLERANCE else transform
