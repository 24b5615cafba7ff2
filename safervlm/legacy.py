"""Module names of version 0.1 and where their contents are today.

A class path in a saved ``fit.yaml`` or ``predict.yaml``, a manifest, or a user's own ``import`` may still name a module
of version 0.1. :data:`MOVED` is the only table of these names. Importing one returns a module that looks its attributes
up in today's modules; :func:`today` rewrites a dotted name, so that settings of old and new runs can be compared.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "safervlm.data.base": ("safervlm.data.module", "safervlm.data.loaders"),
    "safervlm.data.benchmarks": ("safervlm.data.benchmark",),
    "safervlm.demo": ("safervlm.cli.demo",),
    "safervlm.differences": ("safervlm.statistics.differences",),
    "safervlm.doctor": ("safervlm.cli.doctor",),
    "safervlm.evaluation": ("safervlm.results.suite", "safervlm.results.suite_differences", "safervlm.results.mme"),
    "safervlm.evaluation_report": ("safervlm.reports.evaluation", "safervlm.reports.suite_tables"),
    "safervlm.functional": ("safervlm.objectives.functional",),
    "safervlm.images": ("safervlm.io.images",),
    "safervlm.intervals": ("safervlm.statistics.intervals",),
    "safervlm.judge": ("safervlm.judging.classifier", "safervlm.judging.panel"),
    "safervlm.lightning_cli": ("safervlm.cli.lightning",),
    "safervlm.rating": ("safervlm.judging.rating",),
    "safervlm.rules": ("safervlm.judging.rules",),
    "safervlm.scoring": (
        "safervlm.results.scores",
        "safervlm.results.measures",
        "safervlm.results.runs",
        "safervlm.statistics.diversity",
        "safervlm.reports.tables",
    ),
    "safervlm.verify": ("safervlm.cli.verify",),
    "safervlm.vlm.api": ("safervlm.vlm.server.client",),
    "safervlm.vlm.cogvlm": ("safervlm.vlm.remote.cogvlm",),
    "safervlm.vlm.rows": ("safervlm.vlm.prefix",),
    "safervlm.vlm.transformers": ("safervlm.vlm.auto",),
    "safervlm.vlm.xcomposer": ("safervlm.vlm.remote.xcomposer",),
}
# Modules that still exist, but not with all that they had.
SPLIT: dict[str, tuple[str, ...]] = {
    "safervlm.data.alignment": ("safervlm.data.own", "safervlm.data.export"),
}


def find(module: str, name: str) -> Any:
    """Looks an attribute of an old module up in today's modules.

    Args:
        module: a key of :data:`MOVED` or :data:`SPLIT`.
        name: the attribute.

    Raises:
        AttributeError: none of today's modules has it.
    """
    for place in (*MOVED.get(module, ()), *SPLIT.get(module, ())):
        found = vars(import_module(place)).get(name)
        if found is not None:
            return found
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def today(path: str) -> str:
    """Rewrites the dotted name of a class from version 0.1.

    Args:
        path: such as ``safervlm.judge.Judge``.

    Returns:
        The name as it is today, ``safervlm.judging.classifier.Judge``; another text comes back unchanged.
    """
    module, _, name = path.rpartition(".")
    if module in MOVED or module in SPLIT:
        try:
            found = find(module, name)
        except AttributeError:
            return path
        return f"{found.__module__}.{name}"
    return path


def with_todays_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrites the class names in the recorded settings of a run.

    Args:
        settings: flat: dotted keys with their values.
    """
    return {
        key: today(value) if key.rpartition(".")[2] == "class" and isinstance(value, str) else value
        for key, value in settings.items()
    }


class OldModules(MetaPathFinder, Loader):
    """Imports the modules of :data:`MOVED`; installed behind all other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds an old module; None for any other."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Makes a module whose attributes are looked up when they are asked for."""
        module.__getattr__ = lambda name: find(module.__name__, name)  # type: ignore[method-assign]


def install_old_names() -> None:
    """Lets the old names be imported; called once, by the package itself."""
    if not any(isinstance(finder, OldModules) for finder in sys.meta_path):
        sys.meta_path.append(OldModules())
