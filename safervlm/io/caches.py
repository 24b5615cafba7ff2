"""Files and folders that are built aside and moved into place: whole or not at all, whoever else builds them.

What is unfinished has a name that begins with :data:`TEMPORARY`, lies beside what it will become, and is locked
(``flock``) by the process that writes it. The system releases the lock when that process dies, however it dies. So an
unlocked entry of such a name is a leftover, and :func:`remove_leftovers` removes it.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safervlm.errors import ArgumentError

# What the names of unfinished files and folders begin with; nothing else has such a name.
TEMPORARY = ".tmp-safervlm-"


def build_folder(folder: Path, build: Callable[[Path], object], argument: str = "data.cache_dir") -> None:
    """Builds a folder whose content is decided by its name, unless it is there already.

    Several processes may do this at the same time: each builds in a temporary folder of its own beside ``folder``, the
    first one that is finished moves its own into place, and the others use that. Leftovers of dead processes beside
    ``folder`` are removed first.

    Args:
        folder: what to build. Its name must contain everything that determines the content. A folder that is there is
            complete, and is left as it is.
        build: is given the temporary folder, which is empty, and fills it. What it raises gets through, and nothing is
            left behind.
        argument: the setting that ``folder`` comes from, for the error.

    Raises:
        ArgumentError: the folder can't be made: no permission, a read-only disk, or a file in its place.
        OSError: it can't be filled, for example because the disk is full.
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
    """Makes a folder for results that are kept, and removes the leftovers of dead processes in it.

    Args:
        folder: to make, if it isn't there.
        argument: the setting that it comes from, for the error.

    Raises:
        ArgumentError: it can't be made or written to: no permission, a read-only disk, or a file in its place.
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
    """A temporary file or folder beside a path, to be renamed to it; what is not renamed is removed at the end.

    Args:
        path: what it will become; its folder must exist. The ending is the same: libraries choose the format by it.
        directory: make a folder, not a file.

    Yields:
        The path of the empty file or folder.

    Raises:
        OSError: it can't be made.
    """
    aside, lock = _create(path, directory)
    try:
        yield aside
    finally:
        with suppress(OSError):
            _remove(aside)
        os.close(lock)


def remove_leftovers(folder: Path) -> list[str]:
    """Removes temporary files and folders of processes that died.

    Args:
        folder: in which they lie; folders within it are not searched.

    Returns:
        The names of what was removed. What can't be locked or removed is left there.
    """
    removed = []
    try:
        there = [entry for entry in folder.iterdir() if entry.name.startswith(TEMPORARY)]
    except OSError:
        return []
    for entry in sorted(there):
        with suppress(OSError):  # somebody else's, locked, or just gone
            lock = _lock(entry)
            try:
                _remove(entry)
                removed.append(entry.name)
            finally:
                os.close(lock)
    return removed


def _create(path: Path, directory: bool) -> tuple[Path, int]:
    """A temporary file or folder and the descriptor that holds its lock."""
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
            continue  # another process took it for a leftover before it was locked
        except OSError:
            lock = os.open(aside, os.O_RDONLY)  # a file system without locks: nothing is removed there as a leftover
        if aside.exists():
            return aside, lock
        os.close(lock)


def _lock(entry: Path) -> int:
    """An open descriptor of a file or folder that holds its lock.

    Raises:
        BlockingIOError: a living process has it.
        OSError: the file system has no locks.
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
