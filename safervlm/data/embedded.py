"""Images stored in a table as base64: decodes them once into a folder of files."""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path

from safervlm.errors import RecordError
from safervlm.hashing import fingerprint
from safervlm.io.caches import build_folder
from safervlm.io.images import BROKEN, IMAGE_ENDINGS, image_kind
from safervlm.io.progress import track
from safervlm.io.reading import read_object

# Version of the folder's content. Increase it if the output changes, so that older folders are not used.
FORMAT = "3"
# Longer texts are not treated as file names (characters).
LONGEST_NAME = 1000


def names_a_file(value: str) -> bool:
    """Returns whether a value of a table is the name of an image file, judged by its ending.

    Args:
        value: Value of the image column.
    """
    return len(value) < LONGEST_NAME and value.strip().lower().endswith(IMAGE_ENDINGS)


def embedded(values: list[str]) -> dict[int, str]:
    """Finds the values of an image column that are images, not file names or numbers of other rows.

    Args:
        values: Values of the column, row by row. Empty values are skipped.

    Returns:
        The base64 text of each such row, by the row's position.
    """
    return {
        row: value
        for row, value in enumerate(values)
        if value.strip() and not value.strip().isdigit() and not names_a_file(value)
    }


def images_folder(cache: Path, dataset: str, table: Path, column: str) -> Path:
    """Returns the folder for a table's images. Its name contains a hash of the table, the column and the output format.

    Args:
        cache: Parent folder of such folders.
        dataset: Name of the dataset, to make the folder's name readable.
        table: File with the rows.
        column: Name of the image column.
    """
    readable = re.sub(r"[^\w-]", "_", dataset, flags=re.ASCII)[:60]
    return cache / f"{readable}-{fingerprint(table, column, FORMAT)}"


def write_images(folder: Path, dataset: str, values: Mapping[int, str]) -> None:
    """Writes the images of a table's rows as files, all or none; does nothing if the folder exists.

    Args:
        folder: Folder to create (see :func:`images_folder`).
        dataset: Name of the dataset, for the progress bar.
        values: Base64 text of each row with an image, by the row's position.

    Raises:
        ArgumentError: The folder can't be created. The message names ``data.cache_dir``.
        OSError: The folder can't be filled, for example because the disk is full.
    """

    def build(aside: Path) -> None:
        files = {}
        for row, value in track(list(values.items()), f"{dataset}: images"):
            content, ending = decoded(value)
            files[str(row)] = f"{row}{ending}"
            (aside / files[str(row)]).write_bytes(content)
        (aside / "files.json").write_text(json.dumps(files), encoding="utf-8", newline="\n")

    build_folder(folder, build)


def written_images(folder: Path) -> dict[int, Path]:
    """Returns the file of each row that :func:`write_images` wrote.

    Args:
        folder: Folder written by :func:`write_images`.

    Raises:
        RecordError: The folder's list of files is missing or damaged.
    """
    way_out = f"remove the folder {folder}, and the same command writes it again"
    files = read_object(folder / "files.json", way_out)
    for row, name in files.items():
        if not row.isdecimal() or not isinstance(name, str) or Path(name).name != name:
            raise RecordError(f"{folder / 'files.json'}: {row!r}: {name!r} is not a row with its file; {way_out}")
    return {int(row): folder / name for row, name in files.items()}


def decoded(value: str) -> tuple[bytes, str]:
    """Decodes a base64 image.

    Accepts both base64 alphabets (``+/`` and, for URLs, ``-_``), with or without line breaks and padding, plain or as a
    data URL. A value that is not an image is kept unchanged, so that it fails when a question about it is asked.

    Args:
        value: Value of the image column.

    Returns:
        The content, and the file ending of the image's format; for a value that is not an image, the value's bytes and
        ``BROKEN``.
    """
    text = re.sub(r"^\s*data:[^,]{0,200};base64,", "", value, flags=re.IGNORECASE)
    text = re.sub(r"\s+", "", text).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return value.encode(errors="replace"), BROKEN
    kind = image_kind(content)
    return (value.encode(errors="replace"), BROKEN) if kind is None else (content, f".{kind}")
