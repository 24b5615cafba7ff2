"""Which files of a folder are images, and which are left out."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safervlm.io.images import IMAGE_ENDINGS

# What systems put into folders without being asked, besides names that begin with a dot.
SYSTEM_NAMES = ("thumbs.db", "desktop.ini", "__macosx")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name isn't the user's: ``.DS_Store``, ``._1.png``, ``Thumbs.db``."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def files_below(folder: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """The images in a folder and in all folders within it.

    Args:
        folder: to look through; links to folders are not followed.

    Returns:
        The files whose ending, in either case, is one of ``IMAGE_ENDINGS``, sorted; and the other files and folders,
        relative to the folder, by the reason for which they are left out.
    """
    images: list[Path] = []
    hidden: list[Path] = []
    links: list[Path] = []
    others: list[Path] = []
    for place, folders, files in os.walk(folder):
        within = Path(place)
        hidden += [within / name for name in (*folders, *files) if is_hidden(name)]
        folders[:] = [name for name in folders if not is_hidden(name)]
        links += [within / name for name in folders if (within / name).is_symlink()]
        for name in files:
            if not is_hidden(name):
                (images if name.lower().endswith(IMAGE_ENDINGS) else others).append(within / name)
    kinds = ("hidden", hidden), ("links to folders", links), (f"not ending in {', '.join(IMAGE_ENDINGS)}", others)
    names = {reason: sorted(path.relative_to(folder).as_posix() for path in paths) for reason, paths in kinds}
    return sorted(images), {reason: found for reason, found in names.items() if found}


def left_out(dataset: str, reasons: Mapping[str, Sequence[str]]) -> str:
    """The line that says what a set leaves out; empty where it is nothing.

    Args:
        dataset: the set's name.
        reasons: the names of what is left out, by reason.
    """
    if not (count := sum(map(len, reasons.values()))):
        return ""
    parts = [f"{len(names)} {reason}, such as {names[0]!r}" for reason, names in reasons.items() if names]
    return f"{dataset}: {count} {'entry' if count == 1 else 'entries'} of its folder left out: {'; '.join(parts)}"
