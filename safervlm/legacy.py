"""Module names of version 0.1, mapped to the modules that have their contents now.

A class path in a saved ``fit.yaml`` or ``predict.yaml``, a manifest, or a user's own ``import`` may still name a module
of version 0.1. :data:`MOVED` is the only table of these names. Importing one returns a module that looks up its
attributes in the current modules; :func:`today` rewrites a dotted name, so that settings of old and new runs can be
compared.
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
    "safervlm.doctor": ("safervlm.cli.doctor", "safervlm.cli.machine", "safervlm.cli.recipe_checks"),
    "safervlm.evaluation": (
        "safervlm.results.suite",
        "safervlm.results.suite_columns",
        "safervlm.results.suite_estimates",
        "safervlm.results.suite_differences",
        "safervlm.results.mme",
    ),
    "safervlm.evaluation_report": (
        "safervlm.reports.evaluation",
        "safervlm.reports.evaluated",
        "safervlm.reports.suite_tables",
    ),
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
    "safervlm.vlm.rows": ("safervlm.vlm.prefix", "safervlm.vlm.deduplicated", "safervlm.vlm.comparing"),
    "safervlm.vlm.transformers": ("safervlm.vlm.auto",),
    "safervlm.vlm.xcomposer": ("safervlm.vlm.remote.xcomposer",),
}
# Modules that still exist, but some of whose contents moved elsewhere; each calls find in its __getattr__.
SPLIT: dict[str, tuple[str, ...]] = {
    "safervlm.data.alignment": ("safervlm.data.own", "safervlm.data.export"),
    "safervlm.data.unsafe_concepts": (
        "safervlm.data.image_sets",
        "safervlm.data.image_folders",
        "safervlm.data.splits",
    ),
}

# The default of lora.target_modules in version 0.1: in the models that it could train, the current default layers.
TARGET_MODULES = r".*\b(language_model|text_model)\.((model|decoder)\.)*layers\.\d+\.(\w+\.)*(\w+_proj|fc[12])"


def find(module: str, name: str) -> Any:
    """Looks up an attribute of an old module in the current modules.

    Args:
        module: Key of :data:`MOVED` or :data:`SPLIT`.
        name: Name of the attribute.

    Returns:
        The attribute of the first current module that has it.

    Raises:
        AttributeError: No current module has the attribute.
    """
    # The import system looks up __path__, which no module defines, while the current modules may be half imported.
    places = () if name.startswith("__") else (*MOVED.get(module, ()), *SPLIT.get(module, ()))
    for place in places:
        contents = vars(import_module(place))
        if name in contents:
            return contents[name]
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def today(path: str) -> str:
    """Rewrites the dotted name of a class of version 0.1 to its current name.

    Args:
        path: Dotted name, such as ``safervlm.judge.Judge``.

    Returns:
        The current name, here ``safervlm.judging.classifier.Judge``; any other text is returned unchanged.
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
    """Returns recorded settings of a run with the class names and the layers of version 0.1 rewritten to current ones.

    Args:
        settings: Flat settings (dotted key -> value); only keys whose last part is ``class``, and the old default of
            ``lora.target_modules``, are rewritten.
    """
    found = {
        key: today(value) if key.rpartition(".")[2] == "class" and isinstance(value, str) else value
        for key, value in settings.items()
    }
    old = {key: None for key, value in found.items() if key.endswith("lora.target_modules") and value == TARGET_MODULES}
    return found | old


class OldModules(MetaPathFinder, Loader):
    """Import hook for the modules of :data:`MOVED`; it must come after all other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of an old module; None for any other module.

        Args:
            fullname: Dotted name of the module to import.
            path: Ignored; part of the interface of ``MetaPathFinder``.
            target: Ignored; part of the interface of ``MetaPathFinder``.
        """
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Sets up a module whose attributes are looked up lazily, by :func:`find`.

        Args:
            module: The new, empty module.
        """
        module.__getattr__ = lambda name: find(module.__name__, name)  # type: ignore[method-assign]


def install_old_names() -> None:
    """Registers the import hook for the old names; called once, when the package is imported."""
    if not any(isinstance(finder, OldModules) for finder in sys.meta_path):
        sys.meta_path.append(OldModules())
