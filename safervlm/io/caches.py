"""Files and folders that are built under a temporary name and moved into place atomically, also with several processes.

An unfinished file or folder is in a separate folder next to its destination. The name of that folder begins with
:data:`TEMPORARY`, and a file in it is locked (:mod:`safervlm.io.locks`) by its writing process. An unlocked entry
with such a name is therefore a leftover of a process that died. The next command that writes to the same folder removes
it.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safervlm.errors import ArgumentError
from safervlm.io.locks import Lock, acquire, has_locks

# Prefix of the names of unfinished files and folders, and of no others.
TEMPORARY = ".tmp-safervlm-"
LOCK = ".lock"  # lock file of a run folder, and of a temporary folder


def build_folder(folder: Path, build: Callable[[Path], object], argument: str = "data.cache_dir") -> None:
    """Builds a folder whose name determines its content, unless it exists.

    Several processes may call this at the same time: each builds in its own temporary folder next to ``folder``, the
    first to finish moves its folder into place, and the others use that one.

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
            if not folder.is_dir():  # otherwise another process was faster
                raise ArgumentError(
                    f"{argument}: {str(folder)!r} can't be created ({error.strerror}): remove what is there, or name "
                    "another folder"
                ) from None


def cache_folder(folder: Path, argument: str = "data.cache_dir") -> None:
    """Creates a cache folder, if it does not exist, and checks that it can be written to.

    Args:
        folder: Cache folder.
        argument: Setting that ``folder`` comes from, for the error message.

    Raises:
        ArgumentError: The folder can't be created or written to: no permission, a read-only disk, or a file in its
            place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder):
            pass
    except OSError as error:
        raise ArgumentError(
            f"{argument}: {str(folder)!r} can't be written to ({error.strerror}): name another folder"
        ) from None


@contextmanager
def temporary(path: Path, *, directory: bool = False) -> Iterator[Path]:
    """Context manager that creates a temporary file or folder, to be renamed to a path.

    If it has not been renamed at the end of the block, it is removed. The files of a folder that has been renamed are
    given the usual permissions.

    Args:
        path: Destination; its folder must exist. The temporary file has the same suffix, as libraries choose the format
            by it.
        directory: Whether to create a folder instead of a file.

    Yields:
        The path of the empty file or folder.

    Raises:
        OSError: It can't be created.
    """
    with temporary_folder(path.parent) as folder:
        aside = folder / (folder.name if directory else f"{folder.name}{path.suffix}")
        if directory:
            aside.mkdir()
        else:
            aside.touch()
        yield aside
        if directory and not aside.exists() and path.is_dir():  # it has been renamed
            set_default_permissions(path, folder)


def set_default_permissions(folder: Path, place: Path) -> None:
    """Gives the files of a folder the permissions that new files have, which the user's umask determines.

    safetensors writes files that only their owner can read, so that nobody else could use a model in a shared folder.

    Args:
        folder: Folder that this process has just filled.
        place: Temporary folder in which a new file is created, to see its permissions.
    """
    probe = place / "mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode | stat.S_IMODE(file.stat().st_mode))


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Context manager that creates a locked temporary folder and removes it with its content.

    The leftovers of dead processes in the same place are removed first.

    Args:
        parent: Existing folder to create it in.

    Yields:
        The path of the folder, on the same file system as ``parent``. It contains nothing but its lock file.

    Raises:
        OSError: It can't be created.
    """
    remove_leftovers(parent)
    folder, lock = _create(parent)
    try:
        yield folder
    finally:
        with suppress(OSError):
            _remove(folder, lock)
        lock.close()


def remove_leftovers(parent: Path) -> list[str]:
    """Removes temporary files and folders of dead processes.

    Args:
        parent: Folder to search, without its subfolders.

    Returns:
        The names of the removed entries. Links, and entries that can't be locked or removed, are skipped.
    """
    try:
        there = [Path(entry.path) for entry in os.scandir(parent) if entry.name.startswith(TEMPORARY)]
    except OSError:
        return []
    removed = []
    for entry in sorted(there):
        with suppress(OSError):  # another user's, locked, or already removed
            if entry.is_symlink():
                continue
            lock = acquire(entry / LOCK, create=True) if entry.is_dir() else acquire(entry)
            try:
                if has_locks(parent):  # otherwise the process that writes it may still be running
                    _remove(entry, lock)
                    removed.append(entry.name)
            finally:
                lock.close()
    return removed


def _create(parent: Path) -> tuple[Path, Lock]:
    """Creates a temporary folder with its lock."""
    while True:
        folder = parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            folder.mkdir()
        except OSError as error:  # the message of the command names the user's folder
            raise type(error)(error.errno, error.strerror, str(parent)) from error
        try:
            lock = acquire(folder / LOCK, create=True)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process removes it as a leftover, as it was not yet locked
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if (folder / LOCK).exists():
            return folder, lock
        lock.close()  # as above


def _remove(entry: Path, lock: Lock) -> None:
    if os.name == "nt":
        lock.close()  # Windows can't delete an open file
    if entry.is_dir():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
