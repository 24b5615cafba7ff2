"""Locks on files and folders, which the system releases when their process dies, for any reason.

The locks are those of the package ``filelock``. A forked process (a worker of a data loader, for example) inherits the
open file and would keep the lock of a parent that was killed; it therefore closes its copies at once.
"""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

from filelock import lock_descriptor

from safervlm.io.boundary import warn

OPEN_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # no links; a named pipe does not block
POLL = 0.05  # seconds between two attempts
_held: WeakSet["Lock"] = WeakSet()
_without_locks: set[int] = set()  # devices that a warning was printed about


class Lock:
    """An exclusive lock that this process holds, until :meth:`close`.

    Args:
        descriptor: Open and locked file; not locked if the file system does not support locks.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        _held.add(self)

    def close(self) -> None:
        """Releases the lock; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    __del__ = close

    def write_process(self) -> None:
        """Writes the process id into the locked file, for :func:`holder`; a file with any other content is kept."""
        if self._descriptor is not None and _process_in(self._descriptor) is not None:
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, f"{os.getpid()}\n".encode())


def acquire(path: Path, *, create: bool = False, wait: float = 0.0) -> Lock:
    """Opens a file or folder and locks it against other processes, and against other calls in this process.

    On a file system without locks it prints one warning and returns without a lock.

    Args:
        path: File or folder. A symbolic link is not followed.
        create: Whether to open a file for writing, and to create it if it does not exist.
        wait: Time to wait for the lock, in seconds.

    Returns:
        The lock.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file can't be opened: it does not exist, it is a link, or permission is missing.
    """
    descriptor = _open(path, create)
    end = time.monotonic() + wait
    try:
        while not _lock(descriptor, path):
            if time.monotonic() >= end:
                raise BlockingIOError(f"another process holds the lock of {path}")
            time.sleep(POLL)
    except BaseException:
        os.close(descriptor)
        raise
    return Lock(descriptor)


def _open(path: Path, create: bool) -> int:
    try:  # network file systems lock only files that are open for writing
        return os.open(path, os.O_RDWR | (os.O_CREAT if create else 0) | OPEN_FLAGS, 0o666)
    except OSError as error:
        if create or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
            raise
    return os.open(path, os.O_RDONLY | OPEN_FLAGS)


def has_locks(path: Path) -> bool:
    """Returns whether the file system of a path supports locks, according to previous calls of :func:`acquire`.

    Args:
        path: Existing file or folder.
    """
    return path.stat().st_dev not in _without_locks


def holder(path: Path) -> str | None:
    """Returns the process id that is stored in a lock file; None if there is none, or it can't be read.

    Args:
        path: Lock file.
    """
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | OPEN_FLAGS)
        try:
            return _process_in(descriptor) or None
        finally:
            os.close(descriptor)
    return None


def _lock(descriptor: int, path: Path) -> bool:
    """Tries to lock an open file; returns whether it succeeded, or the file system has no locks."""
    device = os.fstat(descriptor).st_dev
    try:
        return device in _without_locks or lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno == errno.EBADF:  # only files that are open for writing can be locked here
            return True
        _without_locks.add(device)
        warn(
            f"{path.parent}: this file system has no locks ({error.strerror}): run one command at a time in it; "
            "unfinished files of killed commands are not removed"
        )
        return True


def _process_in(descriptor: int) -> str | None:
    """Returns the process id in an open lock file, empty for an empty file; None if it contains anything else."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    text = os.read(descriptor, 24).decode("ascii", errors="replace").strip()
    return text if not text or text.isdecimal() else None


def _forget_in_child() -> None:
    for lock in list(_held):
        with suppress(OSError):
            lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
