"""TIFF files: what their tags state beyond Pillow's mode, and the layouts of pixels that Pillow decodes wrongly."""

from PIL import ImageFile

from safervlm.io.pixels import Encoding, UnsupportedPixelsError

WIDTH, HEIGHT, BITS_PER_SAMPLE, PHOTOMETRIC = 256, 257, 258, 262  # tags
SAMPLES_PER_PIXEL, ROWS_PER_STRIP, STRIP_BYTES = 277, 278, 279
PLANAR, TILE_WIDTH, TILE_HEIGHT, TILE_BYTES, SAMPLE_FORMAT = 284, 322, 323, 325, 339
WHITE_IS_ZERO, SEPARATE, SIGNED = 0, 2, 2  # values of PHOTOMETRIC, of PLANAR and of SAMPLE_FORMAT
# Modes that Pillow decodes correctly if a file stores each channel in a plane of its own; in others it loses channels.
PLANAR_MODES = ("RGB", "RGBA", "CMYK")
NO_DATA = "image file is truncated: it has no data for some of its rows"


def tiff_encoding(image: ImageFile.ImageFile, profile: bytes) -> Encoding:
    """Returns the encoding of a TIFF's pixel values.

    Args:
        image: Opened image, not loaded.
        profile: Its ICC profile; empty for none.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    return Encoding(
        bits=max(tags.get(BITS_PER_SAMPLE, (1,))),  # the default of the format
        signed=SIGNED in tags.get(SAMPLE_FORMAT, (1,)),
        white_is_zero=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO,
        profile=profile,
    )


def check_layout(image: ImageFile.ImageFile, encoding: Encoding) -> None:
    """Rejects a TIFF from which Pillow would return other pixels than the file's, without an error.

    Args:
        image: Opened image, not loaded.
        encoding: Its encoding.

    Raises:
        UnsupportedPixelsError: Each channel is stored in a plane of its own, in a form that Pillow does not decode.
        OSError: A strip or tile has fewer bytes than its pixels need; Pillow would read those of the next one.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    raw = image.info.get("compression") == "raw"
    samples = tags.get(SAMPLES_PER_PIXEL, 1)
    planar = samples > 1 and tags.get(PLANAR) == SEPARATE
    if planar and (image.mode not in PLANAR_MODES or (raw and encoding.bits > 8)):
        raise UnsupportedPixelsError(
            f"its {samples} channels of {encoding.bits} bits are stored in separate planes; save them interleaved"
        )
    given = tags.get(STRIP_BYTES) or tags.get(TILE_BYTES) or ()
    if raw and any(given):
        planes = samples if planar else 1
        bits = encoding.bits * samples // planes  # of a pixel in a plane
        needed = [-(-width * bits // 8) * height for width, height in pieces(image)] * planes
        if len(given) < len(needed) or any(there < least for there, least in zip(given, needed, strict=False)):
            raise OSError(NO_DATA)


def pieces(image: ImageFile.ImageFile) -> list[tuple[int, int]]:
    """Returns width and height of each strip or tile of one plane.

    Args:
        image: Opened image, not loaded.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    width, height = tags[WIDTH], tags[HEIGHT]  # image.size is the size after the orientation is applied
    if TILE_WIDTH in tags:
        wide, high = tags[TILE_WIDTH], tags[TILE_HEIGHT]
        return [(wide, high)] * (-(-width // wide) * -(-height // high))
    rows = tags.get(ROWS_PER_STRIP, height)
    return [(width, min(rows, height - top)) for top in range(0, height, rows)]
