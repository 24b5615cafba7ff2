"""Files and folders that are built under a temporary name and moved into place atomically, also with several processes.

An unfinished file or folder has a name that begins with :data:`TEMPORARY`. It lies beside its destination and is locked
(``flock``) by the process that writes it. The system releases the lock when that process dies, for any reason. An
unlocked entry of such a name is therefore a leftover, and :func:`remove_leftovers` removes it.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safervlm.errors import ArgumentError

# Prefix of the names of unfinished files and folders, and of no others.
TEMPORARY = ".tmp-safervlm-"


def build_folder(folder: Path, build: Callable[[Path], object], argument: str = "data.cache_dir") -> None:
    """Builds a folder whose name determines its content, unless it exists.

    Several processes may call this at the same time: each builds in its own temporary folder beside ``folder``, the
    first to finish moves its folder into place, and the others use that one. Leftovers of dead processes beside
    ``folder`` are removed first.

    Args:
        folder: Folder to build. Its name must encode everything that determines the content. An existing folder is
            complete, and is not changed.
        build: Function that fills the empty temporary folder it is given. Its exceptions propagate, and the temporary
            folder is removed.
        argument: Setting that ``folder`` comes from, for the error message.

    Raises:
        ArgumentError: The folder can't be created: no permission, a read-only disk, or a file in its place.
        OSError: The folder can't be filled, for example because the disk is full.
    """
    if folder.is_dir():
        return
    with ExitStack() as stack:
        cache_folder(folder.parent, argument)
        building = stack.enter_context(temporary(folder, directory=True))
        build(building)
        try:
            building.rename(folder)
        except OSError as error:
            if not folder.is_dir():  # else another process was faster
                raise ArgumentError(
                    f"{argument}: {str(folder)!r} can't be made ({error.strerror}): remove what is there, or name "
                    "another folder"
                ) from None


def cache_folder(folder: Path, argument: str = "data.cache_dir") -> None:
    """Creates a cache folder and removes the leftovers of dead processes in it.

    Args:
        folder: Folder to create, if it does not exist.
        argument: Setting that ``folder`` comes from, for the error message.

    Raises:
        ArgumentError: The folder can't be created or written to: no permission, a read-only disk, or a file in its
            place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary(folder / "x"):
            remove_leftovers(folder)
    except OSError as error:
        raise ArgumentError(
            f"{argument}: {str(folder)!r} can't be written to ({error.strerror}): name another folder"
        ) from None


@contextmanager
def temporary(path: Path, *, directory: bool = False) -> Iterator[Path]:
    """Context manager that creates a temporary file or folder beside a path, to be renamed to it.

    If it has not been renamed at the end of the block, it is removed.

    Args:
        path: Destination; its folder must exist. The temporary file has the same suffix, as libraries choose the format
            by it.
        directory: Whether to create a folder instead of a file.

    Yields:
        The path of the empty file or folder.

    Raises:
        OSError: It can't be created.
    """
    aside, lock = _create(path, directory)
    try:
        yield aside
    finally:
        with suppress(OSError):
            _remove(aside)
        os.close(lock)


def remove_leftovers(folder: Path) -> list[str]:
    """Removes temporary files and folders of dead processes.

    Args:
        folder: Folder to search, without its subfolders.

    Returns:
        The names of the removed entries. Entries that can't be locked or removed are skipped.
    """
    removed = []
    try:
        there = [entry for entry in folder.iterdir() if entry.name.startswith(TEMPORARY)]
    except OSError:
        return []
    for entry in sorted(there):
        with suppress(OSError):  # another user's, locked, or already removed
            lock = _lock(entry)
            try:
                _remove(entry)
                removed.append(entry.name)
            finally:
                os.close(lock)
    return removed


def _create(path: Path, directory: bool) -> tuple[Path, int]:
    """Creates a temporary file or folder; returns its path and the descriptor that holds its lock."""
    while True:
        suffix = "" if directory else path.suffix
        aside = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}{suffix}")
        if directory:
            aside.mkdir()
        else:
            os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            lock = _lock(aside)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process removed it as a leftover before it was locked
        except OSError:
            lock = os.open(aside, os.O_RDONLY)  # a file system without locks: nothing is removed there as a leftover
        if aside.exists():
            return aside, lock
        os.close(lock)


def _lock(entry: Path) -> int:
    """Opens a file or folder and locks it; returns the descriptor that holds the lock.

    Raises:
        BlockingIOError: A living process holds the lock.
        OSError: The file system has no locks.
    """
    descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
