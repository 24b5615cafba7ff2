"""What an output may take the place of: an earlier output of the same command, and nothing else."""

from collections.abc import Mapping
from pathlib import Path

from safervlm.errors import ArgumentError


def page_of(file: Path, command: str) -> bool:
    """Whether a file is a page that a command wrote: the line above its title says so."""
    with file.open("rb") as content:
        return f'<p class="eyebrow">SaferVLM {command}</p>'.encode() in content.read(2**16)


def refuse_to_replace_page(page: Path, command: str, *beside: str) -> None:
    """Lets a page take the place of an earlier one, and its tables that of the earlier page's, and of nothing else.

    Args:
        page: the HTML file.
        command: that writes it, for example ``report``.
        beside: endings of what is written beside it, such as ``.csv`` or ``_table.csv``.

    Raises:
        ArgumentError: another file is there, or without a page one of the tables: it is the user's.
    """
    other = f"name another page than {page}, or move the file away"
    if page.is_dir():
        raise ArgumentError(f"out: {page} is a folder; name a page in it, for example {page / f'{command}.html'}")
    if page.exists():
        if not page_of(page, command):
            raise ArgumentError(f"out: {page} is there already and was not written by safervlm {command}; {other}")
        return
    for ending in beside:
        if (file := page.with_name(page.stem + ending)).exists():
            raise ArgumentError(f"out: {file} is there already and would be overwritten; {other}")


def refuse_to_replace_texts(argument: str, texts: Mapping[Path, str]) -> None:
    """Lets files be written that aren't there yet, or hold the same already.

    Args:
        argument: that names their folder.
        texts: what is to be written, by file.

    Raises:
        ArgumentError: a file holds something else.
    """
    for file, text in texts.items():
        if file.exists() and not (file.is_file() and file.read_bytes() == text.encode()):
            raise ArgumentError(
                f"{argument}: {file} is there already and holds something else; name another folder, or move it away"
            )
