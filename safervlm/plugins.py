"""Import of the package ``callbacks``, whose modules configurations name: the user's own first, then those of SaferVLM.

In a source tree ``callbacks/`` is next to this package, in a wheel inside it. A user may have a folder of this name,
too: ``callbacks.X`` is then the user's module X, or that of SaferVLM if the user has none.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

NAME = "callbacks"
PACKAGE = Path(__file__).parent
# Folders that commands were started in. While the parser reads a configuration, the current folder is that of the file.
STARTED_IN: list[str] = []
OURS = next(path for path in (PACKAGE / NAME, PACKAGE.parent / NAME) if path.is_dir())


class CallbacksFinder(MetaPathFinder):
    """Finds the package ``callbacks`` in several folders at once; all other imports are left to the other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds the package where the command was started or in the current folder, then as Python does; ours is last.

        Args:
            fullname: Name of the module that is imported.
            path: Search path of its parent package; not used.
            target: Not used.
        """
        if fullname != NAME:
            return None
        found = next(
            filter(None, (PathFinder.find_spec(NAME, [each]) for each in (*STARTED_IN, str(Path.cwd())))), None
        )
        found = found or PathFinder.find_spec(NAME)
        if found is None or found.submodule_search_locations is None:  # none, or a module of this name
            found = ModuleSpec(NAME, None, is_package=True)
        locations = list(found.submodule_search_locations or ())
        if str(OURS) not in locations:
            locations.append(str(OURS))
        found.submodule_search_locations = locations
        return found


def install_callbacks() -> None:
    """Registers the finder for ``callbacks.X``; called once, by the package itself."""
    if not any(isinstance(finder, CallbacksFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, CallbacksFinder())
