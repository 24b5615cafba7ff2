"""Simulates a full disk, for tests that may not mount one: files in a folder can't exceed a number of bytes."""

import builtins
import errno
import io
import os
from pathlib import Path
from typing import Any

PAGE = 4096


def used(disk: Path) -> int:
    """Returns the space that the files of a disk occupy, in whole pages."""
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in disk.rglob("*") if file.is_file())


class _File(io.FileIO):
    """A file on the simulated disk; like the system, it writes as much as fits and then raises an error."""

    disk: Path
    size: int

    def write(self, content: Any) -> int:
        content = memoryview(content).cast("B")
        there = os.fstat(self.fileno()).st_size
        room = self.size - used(self.disk) + -(-there // PAGE) * PAGE - there
        if len(content) > room:
            if room > 0:
                super().write(content[:room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        return super().write(content)


def limit(disk: Path, size: int) -> None:
    """Limits the number of bytes that this process can write into a folder by Python's own files.

    Args:
        disk: the folder, with its subfolders.
        size: the number of bytes, in whole pages of each file.
    """
    plain, disk = io.open, disk.resolve()

    class File(_File):
        pass

    File.disk, File.size = disk, size

    def limited(file: Any, mode: str = "r", buffering: int = -1, encoding=None, errors=None, newline=None, **more: Any):
        inside = not isinstance(file, int) and disk in Path(os.fsdecode(file)).absolute().parents
        if not inside or not set(mode) & set("wax+"):
            return plain(file, mode, buffering, encoding, errors, newline, **more)
        raw = File(os.fsdecode(file), mode.replace("b", "").replace("t", ""))
        if "b" in mode and buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    builtins.open = io.open = limited
