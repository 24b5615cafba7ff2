"""Lists the images, or other files, in a folder, and those that are skipped."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safervlm.errors import RecordError
from safervlm.io.images import IMAGE_ENDINGS

# Files that operating systems create in folders, in addition to names that begin with a dot.
SYSTEM_NAMES = ("thumbs.db", "desktop.ini", "__macosx")


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder was created by the operating system: ``.DS_Store``, ``._1.png``, ``Thumbs.db``.

    Args:
        name: Name of the file or folder, without its path.
    """
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _unreadable(error: OSError) -> None:
    raise RecordError(
        f"{error.filename}: the folder can't be read ({error.strerror}); correct its permissions, or move it away"
    ) from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def files_below(
    folder: Path,
    belongs: Callable[[str], bool] = _is_image,
    reason: str = f"not ending in {', '.join(IMAGE_ENDINGS)}",
) -> tuple[list[Path], dict[str, list[str]]]:
    """Lists the images, or other files, in a folder and all its subfolders.

    Args:
        folder: Folder to search. Links to folders are not followed.
        belongs: Returns whether a file's name is one of those to list. The default accepts an ending in
            ``IMAGE_ENDINGS``, without regard to case.
        reason: Reason for skipping the other files.

    Returns:
        The files, sorted; and the skipped files and folders, relative to the folder, by the reason for skipping them.

    Raises:
        RecordError: A folder can't be read.
    """
    listed: list[Path] = []
    hidden: list[Path] = []
    links: list[Path] = []
    others: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=_unreadable):
        within = Path(place)
        hidden += [within / name for name in (*folders, *files) if is_hidden(name)]
        folders[:] = [name for name in folders if not is_hidden(name)]
        links += [within / name for name in folders if (within / name).is_symlink()]
        for name in files:
            if not is_hidden(name):
                (listed if belongs(name) else others).append(within / name)
    kinds = ("hidden", hidden), ("links to folders", links), (reason, others)
    names = {why: sorted(path.relative_to(folder).as_posix() for path in paths) for why, paths in kinds}
    return sorted(listed), {why: found for why, found in names.items() if found}


def left_out(dataset: str, reasons: Mapping[str, Sequence[str]]) -> str:
    """Returns the line that reports the skipped files of a dataset; an empty text if there are none.

    Args:
        dataset: Name of the dataset.
        reasons: Names of the skipped files, by reason.
    """
    if not (count := sum(map(len, reasons.values()))):
        return ""
    parts = [f"{len(names)} {reason}, such as {names[0]!r}" for reason, names in reasons.items() if names]
    return f"{dataset}: {count} {'entry' if count == 1 else 'entries'} of its folder skipped: {'; '.join(parts)}"
