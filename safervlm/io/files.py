"""Atomic file writes."""

import os
from collections.abc import Callable
from pathlib import Path

from safervlm.io.caches import temporary


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically: completely or not at all.

    Args:
        path: File to write; its folder is created if it does not exist.
        write: Function that writes the temporary file whose path it is given. The file is next to ``path`` (see
            :func:`safervlm.io.caches.temporary`) and then replaces it.

    Raises:
        OSError: The file can't be written, for example because the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path) as aside:
        mode = aside.stat().st_mode
        write(aside)
        aside.chmod(mode)  # safetensors replaces the file by one that only its owner can read
        with aside.open("r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        aside.replace(path)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Writes a text file atomically: the same bytes on every system, UTF-8 with line feeds.

    Args:
        path: File to write.
        text: Content.

    Raises:
        OSError: The file can't be written.
    """
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))
