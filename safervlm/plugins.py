"""The package ``callbacks``, which configurations name: the user's own modules first, then those of SaferVLM.

In a source tree ``callbacks/`` is beside this package, in a wheel inside it. A user may have a folder of this name,
too: ``callbacks.X`` is then the user's module X, or ours where the user has none.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

NAME = "callbacks"
PACKAGE = Path(__file__).parent
OURS = next(path for path in (PACKAGE / NAME, PACKAGE.parent / NAME) if path.is_dir())


class CallbacksFinder(MetaPathFinder):
    """Finds the package ``callbacks`` in several folders at once; all other imports are left to the other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds the package in the current folder, then as Python does; our folder is searched last.

        Args:
            fullname: Name of the module that is imported.
            path: Of its parent package; not used.
            target: Not used.
        """
        if fullname != NAME:
            return None
        found = PathFinder.find_spec(NAME, [str(Path.cwd())]) or PathFinder.find_spec(NAME)
        if found is None or found.submodule_search_locations is None:  # none, or a module of this name
            found = ModuleSpec(NAME, None, is_package=True)
        locations = list(found.submodule_search_locations or ())
        if str(OURS) not in locations:
            locations.append(str(OURS))
        found.submodule_search_locations = locations
        return found


def install_callbacks() -> None:
    """Lets ``callbacks.X`` be found wherever it is; called once, by the package itself."""
    if not any(isinstance(finder, CallbacksFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, CallbacksFinder())
