"""Every class that a configuration may name is known by its short name."""

import pkgutil
from importlib import import_module

from lightning import LightningDataModule, LightningModule

import safervlm
from safervlm.cli.classes import MODULES
from safervlm.vlm.base import VLM

KINDS = (VLM, LightningModule, LightningDataModule)


def classes_in(module: str) -> set[type]:
    """Returns the classes of SaferVLM of these kinds that a module defines."""
    values = vars(import_module(module)).values()
    return {
        value
        for value in values
        if isinstance(value, type) and issubclass(value, KINDS) and value.__module__.startswith("safervlm.")
    }


def test_every_configurable_class_is_listed() -> None:
    """Searches all modules, independently of the list; base classes of other classes are not models."""
    everywhere = set().union(
        *(
            classes_in(info.name)
            for info in pkgutil.walk_packages(safervlm.__path__, "safervlm.")
            if not info.name.startswith("safervlm.pictograms") and not info.name.endswith("__main__")
        )
    )
    bases = {base for value in everywhere for base in value.__mro__[1:]}
    named = set().union(*map(classes_in, MODULES))
    assert everywhere - bases <= named
    assert len(everywhere - bases) > 15
