"""Replacement of an earlier pictogram world by a new one, without deleting a file that is not the world's."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safervlm.errors import ArgumentError, RecordError
from safervlm.hashing import fingerprint
from safervlm.io.boundary import warn
from safervlm.io.locks import acquire
from safervlm.io.reading import read_object

PARTS = ("unsafe", "safe", "benchmarks", "vlm", "judges", "manifest.json")


def world_manifest(out: Path) -> dict[str, Any]:
    """Reads the manifest of a world; returns an empty dictionary if there is none.

    Args:
        out: Folder of the world.

    Raises:
        RecordError: The manifest is damaged.
    """
    file = out / "manifest.json"
    if not file.exists():
        return {}
    record = read_object(file, "delete this world, or name another folder")
    files = record.get("files", [])
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise RecordError(f"{file}: damaged (not a world's manifest); delete this world, or name another folder")
    return record


def files_in(folder: Path) -> list[str]:
    """Lists all files in a folder and its subfolders, as paths relative to it, sorted.

    Args:
        folder: Folder to search.
    """
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def content_of(folder: Path, files: Iterable[str]) -> str:
    """Returns a hash of the contents of files.

    Args:
        folder: Folder of a world.
        files: Paths relative to it.
    """
    return fingerprint(*(folder / file for file in files))


def reject_unknown_files(out: Path) -> None:
    """Rejects a folder that contains anything but an unchanged pictogram world, so that no other file is deleted.

    Args:
        out: Folder to check. It may be missing or empty.

    Raises:
        ArgumentError: The folder contains a file that is not part of a world, a file of the world was changed, or the
            world is of an old version that did not list its files. The message names a file.
        RecordError: The manifest is damaged.
    """
    if not out.exists():
        return
    manifest = world_manifest(out)
    there = files_in(out)
    known = manifest.get("files")
    if "fingerprint" in manifest and known is None:
        raise ArgumentError(
            f"out: {out} is a world of an older version, which does not list its files, so yours can't be "
            "distinguished from them: name another folder, or delete this one"
        )
    strangers = sorted(path.name for path in out.iterdir() if path.name not in PARTS or known is None)
    strangers += sorted(set(there) - set(known or ()))
    if strangers:
        raise ArgumentError(
            f"out: {out} contains {strangers[0]!r}, which is not part of a pictogram world: name another folder"
        )
    content = manifest.get("content")  # worlds of an older version lack it
    if content is not None and content != content_of(out, (file for file in there if file != "manifest.json")):
        raise ArgumentError(
            f"out: a file in {out} was changed or removed after the world was built: name another folder, or delete "
            "this one"
        )


@contextmanager
def build_lock(folder: Path) -> Iterator[None]:
    """Waits until no other process builds a world in a folder. The lock is released if its process ends.

    Args:
        folder: Parent folder of the worlds.
    """
    held = None
    try:
        held = acquire(folder)
    except BlockingIOError:
        say_progress("another command builds a world here; waiting for its result")
        held = acquire(folder, wait=math.inf)
    except OSError:
        pass  # a folder can't be locked on Windows: each process builds in another folder; the last world is kept
    try:
        yield
    finally:
        if held is not None:
            held.close()


def say_progress(line: str) -> None:
    """Writes a progress line to stderr.

    Args:
        line: Text of the line.
    """
    warn(f"pictograms: {line}")
