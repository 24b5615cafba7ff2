"""Content hashes of a dataset's image files for the manifest, and a notice about animations."""

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safervlm.hashing import fingerprint
from safervlm.io.images import has_frames, open_regular, printable
from safervlm.io.tables import say


def images_fingerprint(files: Mapping[str, str | Path | None]) -> str:
    """Computes a hash of images' names and contents for the manifest: 16 hexadecimal digits.

    Args:
        files: Image's name within the dataset -> its file.
    """
    return fingerprint("\n".join(f"{name} {properties_of_image_file(file).digest}" for name, file in files.items()))


def report_frames(dataset: str, files: Mapping[str, str | Path | None]) -> None:
    """Prints how many images are animations or have several pages, of which only the first frame is used.

    The line is printed once per process. In a run with several processes, only the first one should call this.

    Args:
        dataset: Name of the dataset.
        files: Image's name within the dataset -> its file.
    """
    names = [name for name, file in files.items() if properties_of_image_file(file).frames]
    if names:
        print_once(
            f"{printable(dataset)}: {len(names)} of {len(files)} images are animations or have several pages, for "
            f"example {printable(names[0])}: the model is shown the first frame"
        )


@cache
def print_once(line: str) -> None:
    """Prints a line, once per process.

    Args:
        line: Line to print.
    """
    say(line)


@dataclass(frozen=True)
class ImageFileProperties:
    """Properties of an image file that can be determined without decoding it.

    Attributes:
        digest: SHA-256 of the content in hexadecimal digits; empty if the file can't be read.
        frames: Whether it is an animation or has several pages.
    """

    digest: str
    frames: bool


def properties_of_image_file(path: str | Path | None) -> ImageFileProperties:
    """Returns the properties of an image file; the file is read once per process unless it changes.

    Args:
        path: File; if it is missing or not a regular file, the digest is empty.
    """
    try:
        there = Path(str(path)).stat()
        return (
            _read_image_file_properties(str(path), there.st_size, there.st_mtime_ns)
            if stat.S_ISREG(there.st_mode)
            else ImageFileProperties("", False)
        )
    except (OSError, ValueError):
        return ImageFileProperties("", False)


@cache
def _read_image_file_properties(path: str, size: int, changed: int) -> ImageFileProperties:
    with open_regular(path) as file:
        return ImageFileProperties(hashlib.file_digest(file, "sha256").hexdigest(), has_frames(file))
