"""Imports the classes that a configuration may name by their short names, such as ``--model.vlm Llava``.

jsonargparse looks a short name up among the subclasses that are imported. There is no other list of them.
"""

from importlib import import_module

MODULES = (
    "safervlm.data.alignment",
    "safervlm.data.benchmark",
    "safervlm.data.contexts",
    "safervlm.data.labelled",
    "safervlm.data.own",
    "safervlm.data.responses",
    "safervlm.data.suite",
    "safervlm.data.unsafe_concepts",
    "safervlm.judging.panel",
    "safervlm.measure",
    "safervlm.objectives",
    "safervlm.vlm.auto",
    "safervlm.vlm.llava",
    "safervlm.vlm.llava_original",
    "safervlm.vlm.remote.cogvlm",
    "safervlm.vlm.remote.xcomposer",
    "safervlm.vlm.server.client",
)


def import_classes() -> None:
    """Imports the modules of :data:`MODULES`, and with them all classes that have a short name."""
    for module in MODULES:
        import_module(module)
