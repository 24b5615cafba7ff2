"""Overwrite checks: an output may replace an earlier output of the same command, and no other file."""

from collections.abc import Mapping
from pathlib import Path

from safervlm.errors import ArgumentError


def page_of(file: Path, command: str) -> bool:
    """Returns whether an HTML file was written by a command, by the line above the page's title.

    Args:
        file: Existing file.
        command: Name of the command, for example ``report``.
    """
    with file.open("rb") as content:
        return f'<p class="eyebrow">SaferVLM {command}</p>'.encode() in content.read(2**16)


def require_replaceable_page(page: Path, command: str, *beside: str) -> None:
    """Rejects the path of a page if writing it would replace a file that the command did not write.

    An earlier page and the tables next to it may be replaced.

    Args:
        page: HTML file to write.
        command: Command that writes it, for example ``report``.
        *beside: Endings of the files written next to it, such as ``.csv`` or ``_table.csv``.

    Raises:
        ArgumentError: The path is a folder or a file that the command did not write, or there is no page but one
            of the other files.
    """
    other = f"name another page than {page}, or move the file away"
    if page.is_dir():
        raise ArgumentError(f"out: {page} is a folder; name a page in it, for example {page / f'{command}.html'}")
    if page.exists():
        if not page_of(page, command):
            raise ArgumentError(f"out: {page} already exists and was not written by safervlm {command}; {other}")
        return
    for ending in beside:
        if (file := page.with_name(page.stem + ending)).exists():
            raise ArgumentError(f"out: {file} already exists and would be overwritten; {other}")


def require_replaceable_texts(argument: str, texts: Mapping[Path, str]) -> None:
    """Rejects files to be written that exist with a different content.

    Args:
        argument: Argument that names their folder, for the error message.
        texts: File -> text to write.

    Raises:
        ArgumentError: A file exists and has a different content.
    """
    for file, text in texts.items():
        if file.exists() and not (file.is_file() and file.read_bytes() == text.encode()):
            raise ArgumentError(
                f"{argument}: {file} already exists with other contents; name another folder, or move it away"
            )


def require_empty_folder(argument: str, folder: Path) -> None:
    """Rejects a folder to be written that exists and is not empty, or is a file.

    Args:
        argument: Argument that names it, for the error message.
        folder: Folder.

    Raises:
        ArgumentError: The folder is not empty, or it is a file.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise ArgumentError(f"{argument}: {folder} already exists and is not empty; name another folder")
