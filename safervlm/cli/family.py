"""``--model.vlm.model NAME`` alone: the class of the VLM follows from the checkpoint, not from the recipe."""

from collections.abc import Sequence
from inspect import signature
from pkgutil import resolve_name

from jsonargparse import ArgumentParser, Namespace

from safervlm.cli.arguments import options, plain_name
from safervlm.errors import ArgumentError
from safervlm.io.tables import say
from safervlm.vlm.auto import Transformers
from safervlm.vlm.base import VLM
from safervlm.vlm.family import BUILT_IN, family_of


def fitting_class(vlm: Namespace, words: Sequence[str]) -> Namespace:
    """Returns the settings of a VLM with the class that loads its checkpoint, if only the checkpoint was typed.

    Settings that differ from the defaults of the recipe's class are kept where the new class has them.

    Args:
        vlm: Settings of the recipe with the typed model: class_path and init_args.
        words: Words of the command line.

    Returns:
        The settings; the same ones if a class was typed, too, or the recipe's is not one of the built-in families.
    """
    typed = {plain_name(name) for name, _ in options(words)}
    before = resolve_name(vlm["class_path"])
    if "model.vlm.model" not in typed or "model.vlm" in typed or "model.vlm.class_path" in typed:
        return vlm
    if before not in (*BUILT_IN, Transformers):
        return vlm
    given = vlm["init_args"].as_dict()
    try:
        family = family_of(given["model"], given["revision"])
    except ArgumentError:
        return vlm  # the class reports it
    if family is before:
        return vlm
    parameters = signature(before).parameters
    changed = {name: value for name, value in given.items() if value != parameters[name].default}
    kept = {name: value for name, value in changed.items() if name in signature(family).parameters}
    left = "".join(f"; {name} does not apply" for name in changed if name not in kept)
    say(f"{given['model']} is loaded by {family.__name__}{left}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VLM, "vlm")
    path = f"{family.__module__}.{family.__qualname__}"
    parsed: Namespace = parser.parse_object({"vlm": {"class_path": path, "init_args": kept}})
    return parsed["vlm"]
