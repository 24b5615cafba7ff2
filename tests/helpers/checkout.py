"""Snapshot of the checkout, to check that tests do not change it."""

import os
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent.parent
CACHES = {"__pycache__", ".git", ".pytest_cache", ".ruff_cache", ".mypy_cache"}


def contents(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Size and modification time of each file in a folder, None for folders; no caches, no virtual environments."""
    found: dict[str, tuple[int, int] | None] = {}
    for here, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if name not in CACHES and not name.endswith(".egg-info") and not Path(here, name, "pyvenv.cfg").exists()
        ]
        found |= {str(Path(here, name)): None for name in folders}
        for path in (Path(here, name) for name in files):
            state = path.lstat()
            found[str(path)] = (state.st_size, state.st_mtime_ns)
    return found
