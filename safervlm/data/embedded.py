"""Images that stand in a table as base64: decoded once into a folder of files."""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from safervlm.errors import RecordError
from safervlm.hashing import fingerprint
from safervlm.io.caches import build_folder
from safervlm.io.escape import for_terminal
from safervlm.io.images import BROKEN, IMAGE_ENDINGS, image_kind
from safervlm.io.reading import read_object

# Of the folder's content; a change of what is written needs another number, so that older folders are not used.
FORMAT = "2"
# A longer text is no file's name.
LONGEST_NAME = 1000


def names_a_file(value: str) -> bool:
    """Whether a table's value is the name of an image file, by its ending."""
    return len(value) < LONGEST_NAME and value.strip().lower().endswith(IMAGE_ENDINGS)


def embedded(values: list[str]) -> dict[int, str]:
    """The rows of a column of images that hold the image itself: no file's name, and no number of another row.

    Args:
        values: of the column, row by row; an empty one holds nothing.

    Returns:
        The value of each such row, by the row's position.
    """
    return {
        row: value
        for row, value in enumerate(values)
        if value.strip() and not value.strip().isdigit() and not names_a_file(value)
    }


def images_folder(cache: Path, dataset: str, table: Path, column: str) -> Path:
    """The folder of a table's images: its name has a hash of the table, the column, and how the files are written.

    Args:
        cache: where such folders are kept.
        dataset: the set's name, for whoever looks into the cache.
        table: the file that holds the rows.
        column: of the images.
    """
    readable = re.sub(r"[^\w-]", "_", dataset, flags=re.ASCII)[:60]
    return cache / f"{readable}-{fingerprint(table, column, FORMAT)}"


def write_images(folder: Path, dataset: str, values: Mapping[int, str]) -> None:
    """Writes the images of a table's rows as files, all or none, unless the folder is there.

    Args:
        folder: see :func:`images_folder`.
        dataset: the set's name.
        values: of the rows that hold an image.

    Raises:
        ArgumentError: the folder can't be made; the line names ``data.cache_dir``.
    """

    def build(aside: Path) -> None:
        files = {}
        console = Console(stderr=True)
        for row, value in track(
            list(values.items()), escape(for_terminal(f"{dataset}: images")), console=console, transient=True
        ):
            content, ending = decoded(value)
            files[str(row)] = f"{row}{ending}"
            (aside / files[str(row)]).write_bytes(content)
        (aside / "files.json").write_text(json.dumps(files), encoding="utf-8")

    build_folder(folder, build)


def written_images(folder: Path) -> dict[int, Path]:
    """The file of each row that :func:`write_images` wrote.

    Raises:
        RecordError: the folder's list of files is damaged.
    """
    way_out = f"remove the folder {folder}, and the same command makes it again"
    files = read_object(folder / "files.json", way_out)
    for row, name in files.items():
        if not row.isdecimal() or not isinstance(name, str) or Path(name).name != name:
            raise RecordError(f"{folder / 'files.json'}: {row!r}: {name!r} is no row with its file; {way_out}")
    return {int(row): folder / name for row, name in files.items()}


def decoded(value: str) -> tuple[bytes, str]:
    """The bytes of an image in base64, and its kind's ending.

    Both alphabets are read (``+/`` and, for URLs, ``-_``), in lines or not, with or without padding, alone or as a data
    URL. What is none is kept, to fail when it is asked about.
    """
    text = re.sub(r"^\s*data:[^,]{0,200};base64,", "", value, flags=re.IGNORECASE)
    text = re.sub(r"\s+", "", text).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return value.encode(errors="replace"), BROKEN
    kind = image_kind(content)
    return (value.encode(errors="replace"), BROKEN) if kind is None else (content, f".{kind}")
