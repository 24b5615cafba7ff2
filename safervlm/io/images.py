"""Image files: where they may be located, and how they are decoded. No other module opens images.

Every image given to a model, a server or a page is decoded by :func:`decode`, so that all use the same pixels: those
that an image viewer shows. A file is read once, completely, and only if it is a regular file.
"""

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageColor, ImageFile, UnidentifiedImageError

from safervlm.errors import ArgumentError, RecordError, first_line
from safervlm.io.frames import first_frame
from safervlm.io.pixels import Encoding, to_srgb
from safervlm.io.tiff import NO_DATA, check_layout, tiff_encoding
from safervlm.ranges import in_range

# Image given to a VLM with a question about a name, as published.
BLANK = Image.new("RGB", (1000, 1000), "white")
# Suffixes of image files, in lower case. The format of a file is determined by its content.
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# The only decoders that are tried: others would, for example, start Ghostscript (EPS). JPEG includes MPO, which many
# phones write. AVIF requires Pillow 11.3.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if find_spec("PIL.AvifImagePlugin") else []))
# Suffix of a file that stores a value from the image column of a table if the value is not an image.
BROKEN = ".broken"

# First bytes of files that are mistaken for images, in lower case.
MISTAKEN = (
    (b"%pdf", "a PDF"),
    (b"%!ps", "PostScript"),
    (b"8bps", "a Photoshop file"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file by git lfs pull"),
)
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")

ORIENTATION = 0x0112  # EXIF tag; the table has the transpositions for its values
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Formats that every server decodes to the same pixels, if nothing in the file requires interpretation.
COMMON_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
SRGB_GAMMA = 1 / 2.2


@dataclass(frozen=True)
class ImageSettings:
    """Settings of image decoding, and size limits, which are checked before the pixels are decoded.

    Args:
        max_pixels: Maximum of width times height. Decoding takes 4 bytes of memory per pixel, for a moment up to 16.
        max_side: Maximum length of the longer side in pixels; some models pad an image to a square of this side.
        max_aspect_ratio: Maximum of the longer side divided by the shorter one.
        max_bytes: Maximum file size in bytes.
        background: Colour behind transparent pixels: a name, or #rrggbb.
    """

    max_pixels: int = 80_000_000
    max_side: int = 20_000
    max_aspect_ratio: float = 100.0
    max_bytes: int = 100_000_000
    background: str = "white"

    def __post_init__(self) -> None:
        """Raises an ArgumentError for a limit below 1, or a background that is not an opaque colour."""
        in_range("vlm.images", least=1, max_pixels=self.max_pixels, max_side=self.max_side, max_bytes=self.max_bytes)
        if not self.max_aspect_ratio >= 1:
            raise ArgumentError(f"vlm.images.max_aspect_ratio: at least 1, got {self.max_aspect_ratio}")
        try:
            valid = len(ImageColor.getrgb(self.background)) == 3
        except ValueError:
            valid = False
        if not valid:
            raise ArgumentError(
                f"vlm.images.background: a colour such as white or #ffffff, without opacity, got {self.background!r}"
            )

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """Background colour as red, green and blue, 0 to 255."""
        red, green, blue = ImageColor.getrgb(self.background)[:3]
        return red, green, blue

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine responses, for the manifest; empty for the default background.

        The limits determine whether a question is asked, never its response: a run can be resumed with other limits.
        """
        return {} if self.background_rgb == (255, 255, 255) else {"images": {"background": self.background}}


@dataclass(frozen=True)
class Decoded:
    """A decoded image file.

    Attributes:
        image: Image in mode RGB.
        content: Bytes of the file.
        format: Pillow's name of the file's format.
        plain: Whether any other decoder returns the same pixels: 8 bits, opaque, one frame, no orientation, no colour
            profile.
    """

    image: Image.Image
    content: bytes
    format: str
    plain: bool


def image_file(folder: Path, image: str, record: str) -> Path:
    """Returns the file of an image that a dataset names; a missing file is reported when the image is needed.

    Args:
        folder: The dataset's folder; images outside it are rejected, whether by ``..``, an absolute path or a link.
        image: Name of the image, relative to the folder.
        record: Id of the record that names it, for the error message.

    Raises:
        RecordError: The file lies outside the folder, or its name is invalid.
    """
    try:
        file = (folder / image).resolve()
        inside, _ = file.is_relative_to(folder.resolve()), file.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL character, a name that is too long
        raise RecordError(
            f"{printable(record)}: the image {image[:200]!r} can't be opened ({first_line(error)}): correct its name"
        ) from None
    if not inside:
        raise RecordError(
            f"{printable(record)}: the image {image!r} lies outside {folder}: move or copy it into the folder"
        )
    return folder / image


def open_image(path: str | Path, record: str, settings: ImageSettings = ImageSettings()) -> Image.Image:
    """Returns an image in mode RGB, as an image viewer shows it (see :func:`decode`).

    Args:
        path: Image file.
        record: Id of its record, for the error message.
        settings: Limits, and the colour behind transparent pixels.

    Raises:
        RecordError: See :func:`decode`.
    """
    return decode(path, record, settings).image


def decode(path: str | Path, record: str, settings: ImageSettings = ImageSettings()) -> Decoded:
    """Reads and decodes an image file as an image viewer shows it.

    The EXIF orientation is applied, more than 8 bits per channel are scaled to 8, colours are converted to sRGB by the
    file's ICC profile, and transparency is composited on the background. Of an animation or a file of several pages the
    first frame is decoded, at its place on the canvas (see :mod:`safervlm.io.frames`).

    Args:
        path: Image file.
        record: Id of its record, for the error message.
        settings: Limits, and the colour behind transparent pixels.

    Raises:
        RecordError: The file is missing, damaged, truncated, too large, not regular or not one of :data:`FORMATS`.
    """
    content = read_file(path, record, settings)
    what = f"{printable(record)}: the image {printable(path)}"
    try:
        with strict_pillow(settings.max_pixels), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            check_size(image, what, settings)
            return decode_opened(image, content, settings)
    except RecordError:
        raise
    except UnidentifiedImageError:
        raise RecordError(no_image(path, content, record)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RecordError(
            f"{what} is too large ({first_line(error)}): make it smaller, or raise vlm.images.max_pixels"
        ) from None
    except MemoryError:
        raise RecordError(f"{what} doesn't fit into memory: make it smaller, or lower data.num_workers") from None
    except Exception as error:
        raise RecordError(f"{what} is damaged ({first_line(error)}): replace the file") from None


def read_file(path: str | Path, record: str, settings: ImageSettings) -> bytes:
    """Reads the bytes of a regular file; a pipe, a device or a folder is never opened.

    Args:
        path: File to read.
        record: Id of its record, for the error message.
        settings: ``max_bytes`` limits the size.

    Raises:
        RecordError: The file is missing, empty, too large, not a regular file, or can't be read.
    """
    what = f"{printable(record)}: the image {printable(path)}"
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise RecordError(f"{what} is not a regular file: replace it or remove the record")
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = b"" if size > settings.max_bytes else file.read(settings.max_bytes + 1)
    except RecordError:
        raise
    except FileNotFoundError:
        raise RecordError(f"{what} is missing: add the file or remove the record") from None
    except (OSError, ValueError) as error:  # a ValueError: a NUL character in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise RecordError(f"{what} can't be read ({reason}): correct the file or its permissions") from None
    if size > settings.max_bytes or len(content) > settings.max_bytes:
        raise RecordError(
            f"{what} has {max(size, len(content))} bytes, more than {settings.max_bytes}: make it smaller, or raise "
            "vlm.images.max_bytes"
        )
    if not content:
        raise RecordError(f"{what} is empty: replace the file or remove the record")
    return content


def open_regular(path: str | Path) -> io.BufferedReader:
    """Opens a file for reading without blocking, even if it has been replaced by a pipe since it was checked.

    Args:
        path: File to open.
    """
    return open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")  # noqa: PTH123 (a descriptor)


@contextmanager
def strict_pillow(max_pixels: int | None) -> Iterator[None]:
    """Context manager in which Pillow rejects oversized and truncated images, and prints no warnings.

    Args:
        max_pixels: Maximum of width times height, also of frames within a file; None if no pixel is decoded.
    """
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def check_size(image: Image.Image, what: str, settings: ImageSettings) -> None:
    """Rejects an image that is too large, by the size in its header.

    Args:
        image: Opened image, not loaded.
        what: Record and file, for the error message.
        settings: Limits.

    Raises:
        RecordError: A limit is exceeded; the message names it.
    """
    short, long = sorted(image.size)
    for name, value, bound, kind in (
        ("max_pixels", short * long, settings.max_pixels, "pixels"),
        ("max_side", long, settings.max_side, "pixels along its longer side"),
        (
            "max_aspect_ratio",
            long / max(short, 1),
            settings.max_aspect_ratio,
            "times longer than wide or wider than long",
        ),
    ):
        if value > bound:
            raise RecordError(
                f"{what} is {image.width} x {image.height}: {value:.10g} {kind}, more than {bound:.10g}; make it "
                f"smaller, or raise vlm.images.{name}"
            )


def decode_opened(image: ImageFile.ImageFile, content: bytes, settings: ImageSettings) -> Decoded:
    """Decodes an opened image.

    Args:
        image: Opened image, not loaded.
        content: Bytes of its file.
        settings: Colour behind transparent pixels.

    Raises:
        OSError: The file has no data for some rows; see also :func:`safervlm.io.pixels.to_srgb` and Pillow.
    """
    kind = str(image.format)
    if kind == "PNG":  # verify the checksums, which loading skips
        with Image.open(io.BytesIO(content), formats=[kind]) as again:
            again.verify()
    encoding = encoding_of(image, content)
    alone, covered = first_frame(image, content)
    if kind == "TIFF":
        check_layout(image, encoding)
    image.load()
    frame = image if alone is content else Image.open(io.BytesIO(alone), formats=[kind])
    shown = to_srgb(frame, encoding, settings.background_rgb)
    if kind in ("GIF", "PNG", "WEBP") and covered != (0, 0, *image.size):  # pixels outside the frame are transparent
        uncovered = Image.new("RGB", image.size, settings.background_rgb)
        uncovered.paste(shown.crop(covered) if frame is image else shown, covered)
        shown = uncovered
    elif (covered[2] - covered[0]) * (covered[3] - covered[1]) < image.width * image.height:
        raise OSError(NO_DATA)
    orientation = orientation_of(frame)
    plain = (
        kind in COMMON_FORMATS
        and image.mode in ("RGB", "L", "P")
        and encoding.bits <= 8
        and not encoding.profile
        and not image.has_transparency_data
        and covered == (0, 0, *image.size)
        and orientation == 1
        and abs(image.info.get("gamma", SRGB_GAMMA) - SRGB_GAMMA) < 0.01
        and not has_frames(io.BytesIO(content))
    )
    if orientation in TRANSPOSITIONS:
        shown = shown.transpose(TRANSPOSITIONS[orientation])
    shown.info.clear()  # otherwise a profile or transparent colour would be written to a PNG, and applied again
    return Decoded(shown, content, kind, plain)


def encoding_of(image: ImageFile.ImageFile, content: bytes) -> Encoding:
    """Returns the encoding of a file's pixel values.

    Args:
        image: Opened image, not loaded.
        content: Bytes of its file.
    """
    profile = image.info.get("icc_profile")
    profile = profile if isinstance(profile, bytes) else b""
    if image.format == "PNG":
        return Encoding(bits=content[24], profile=profile)  # byte 24: the bit depth in the header
    return tiff_encoding(image, profile) if image.format == "TIFF" else Encoding(profile=profile)


def orientation_of(image: Image.Image) -> int | None:
    """Returns the EXIF orientation still to be applied, 1 for none; None if the EXIF data does not state a valid one.

    Args:
        image: Loaded image; Pillow has applied the orientation of a TIFF.
    """
    if image.format == "TIFF":
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION, None if "exif" in image.info else 1)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, OverflowError, struct.error):
        return None  # viewers show such an image unchanged
    return orientation if isinstance(orientation, int) else None


def has_frames(file: BinaryIO) -> bool:
    """Returns whether a file is an animation or has several pages; a second image in a phone's JPEG (MPO) is ignored.

    No pixel is decoded, so that the size of the image does not matter.

    Args:
        file: File opened for reading in binary mode.
    """
    try:
        with strict_pillow(None), Image.open(file, formats=FORMATS) as image:
            return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:
        return False


def image_kind(content: bytes) -> str | None:
    """Returns the lower-case name of an image's format, such as png or jpeg (also for MPO); None for any other file.

    No pixel is decoded. The limits of the size are checked when the image is used, by the settings of that use.

    Args:
        content: Bytes of a file; only the formats of :data:`FORMATS` are recognised.
    """
    try:
        with strict_pillow(None), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return {"MPO": "jpeg"}.get(str(image.format), str(image.format).lower())
    except Exception:
        return None


def no_image(path: str | Path, content: bytes, record: str) -> str:
    """Returns the error message for a file that no decoder accepts.

    Args:
        path: File.
        content: Bytes of the file.
        record: Id of its record.
    """
    if Path(path).suffix == BROKEN:
        there = content.decode(errors="replace")
        return (
            f"{printable(record)}: its image in the table, {there[:40]!r}, is neither an image in base64, nor the "
            f"index of a row, nor a file ending in {', '.join(IMAGE_ENDINGS)}: correct the table"
        )
    start = content[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    looks = next((f" but {name}" for prefix, name in MISTAKEN if start.startswith(prefix)), "")
    if content[4:8] == b"ftyp" and content[8:12] in HEIC_BRANDS:
        looks = " but HEIC"
    return (
        f"{printable(record)}: {printable(path)} is not an image of a supported format ({', '.join(FORMATS)}){looks}: "
        "replace the file or remove the record"
    )


def printable(text: str | Path) -> str:
    """Returns a record's id or a file's name for a message; escaped if it contains unprintable characters.

    Args:
        text: Id or name.
    """
    text = str(text)
    return text if text.isprintable() else repr(text)
