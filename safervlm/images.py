"""Image files: where they may lie, and how they are opened."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from safervlm.errors import RecordError

# What a VLM is shown with a question about a name, as published.
BLANK = Image.new("RGB", (1000, 1000), "white")
# The endings of image files, in lower case. What a file is, its content decides.
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# The ending of a file that holds what a table has in an image's place, and what is none.
BROKEN = ".broken"


def image_file(folder: Path, image: str, record: str) -> Path:
    """The file of an image that a data set names.

    Args:
        folder: the data set's folder; no image lies outside it, whether by ``..``, an absolute path or a link.
        image: the image's name, relative to the folder.
        record: the record that names it, for the error.

    Raises:
        RecordError: the file is missing or lies outside the folder.
    """
    file = (folder / image).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise RecordError(f"{record}: the image {image!r} lies outside {folder}: move or copy it into the folder")
    if not file.is_file():
        raise RecordError(f"{record}: the image {folder / image} is missing: add the file or remove the record")
    return folder / image


def open_image(path: str | Path, record: str) -> Image.Image:
    """The whole image in RGB.

    Args:
        path: the image's file.
        record: the id of the record that it belongs to, for the error.

    Raises:
        RecordError: the file is missing, truncated or not an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise RecordError(f"{record}: the image {path} is missing: add the file or remove the record") from None
    except UnidentifiedImageError:
        if Path(path).suffix == BROKEN:
            there = Path(path).read_text(encoding="utf-8", errors="replace")
            raise RecordError(
                f"{record}: its image in the table, {there[:40]!r}, is no base64 of an image, no index of a row and no "
                f"file ending in {', '.join(IMAGE_ENDINGS)}: mend the table"
            ) from None
        raise RecordError(f"{record}: {path} is not an image: replace the file or remove the record") from None
    # Pillow's decoders raise whatever a broken file makes them stumble over, SyntaxError (PNG) included.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecordError(f"{record}: the image {path} is damaged ({reason}): replace the file") from None
