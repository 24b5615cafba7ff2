"""Checkpoints that are folders: ``last.ckpt`` is then a symbolic link to a folder, as links are replaced atomically.

The folders have reserved names, :data:`FOLDERS`, and no other folder is ever removed.
"""

import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from safervlm.io.caches import temporary_folder

FOLDERS = re.compile(r"\.safervlm-[0-9a-f]{16}\.ckpt")


def link_to_checkpoint_folder(written: Path, last: Path) -> None:
    """Makes a link point to a checkpoint folder, atomically, and removes the folder that it pointed to.

    Args:
        written: Complete checkpoint folder in a temporary place of the same file system; it is moved.
        last: The link, in the folder of the checkpoints.
    """
    folder = last.with_name(f".safervlm-{secrets.token_hex(8)}.ckpt")
    written.rename(folder)
    with temporary_folder(last.parent) as aside:
        link = aside / last.name
        link.symlink_to(folder.name)
        link.replace(last)
    remove_replaced(last)


def remove_replaced(last: Path) -> None:
    """Removes the checkpoint folders that :func:`link_to_checkpoint_folder` made and nothing points to.

    Args:
        last: The link, in the folder of the checkpoints; both may be missing.
    """
    current = last.readlink().name if last.is_symlink() else None
    for folder in last.parent.glob(".safervlm-*.ckpt"):
        if FOLDERS.fullmatch(folder.name) and folder.name != current and folder.is_dir() and not folder.is_symlink():
            with suppress(OSError):
                shutil.rmtree(folder)
