"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

from safervlm.io.caches import temporary


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all.

    Args:
        path: the file to write; its folder is made if it is missing.
        write: is given the path of a temporary file beside it (see :func:`safervlm.io.caches.temporary`), which then
        takes
            ``path``'s place.

    Raises:
        OSError: the file can't be written, for example because the disk is full; it names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path) as aside:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
