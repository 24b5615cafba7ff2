"""What the manifest and the terminal say about the image files of a data set: a hash of their contents, animations."""

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
    """A hash of images' names and contents, for the manifest; 16 hexadecimal digits.

    Args:
        files: the file of each image, by the image's name within the data set.
    """
    return fingerprint("\n".join(f"{name} {look_at(file).digest}" for name, file in files.items()))


def report_frames(dataset: str, files: Mapping[str, str | Path | None]) -> None:
    """Prints how many images are animations or have several pages, of which the first frame is taken.

    The same line is printed once a process; of a run with several processes, let the first one call it.

    Args:
        dataset: the data set's name.
        files: the file of each image, by the image's name within the data set.
    """
    names = [name for name, file in files.items() if look_at(file).frames]
    if names:
        print_once(
            f"{printable(dataset)}: {len(names)} of {len(files)} images are animations or have several pages, for "
            f"example {printable(names[0])}: the model is shown the first frame"
        )


@cache
def print_once(line: str) -> None:
    """Prints a line that this process hasn't printed yet."""
    say(line)


@dataclass(frozen=True)
class Look:
    """What is known of an image file without decoding it.

    Attributes:
        digest: SHA-256 of its content in hexadecimal digits; empty where it can't be read.
        frames: whether it is an animation or has several pages.
    """

    digest: str
    frames: bool


def look_at(path: str | Path | None) -> Look:
    """Reads a file once a process, unless it has changed since.

    Args:
        path: the file; one that is missing or no regular file is described as one without content.
    """
    try:
        there = Path(str(path)).stat()
        return _look_at(str(path), there.st_size, there.st_mtime_ns) if stat.S_ISREG(there.st_mode) else Look("", False)
    except (OSError, ValueError):
        return Look("", False)


@cache
def _look_at(path: str, size: int, changed: int) -> Look:
    with open_regular(path) as file:
        return Look(hashlib.file_digest(file, "sha256").hexdigest(), has_frames(file))
