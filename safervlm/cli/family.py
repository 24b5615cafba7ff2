"""Selects the VLM's class by its checkpoint if ``--model.vlm.model NAME`` is given without a class."""

import json
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

MODEL = ("model.vlm.model", "model.vlm.revision")


def with_class(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """Returns a command line that also names the class of the VLM, if only its checkpoint was typed.

    The other typed arguments of the VLM, for example ``--model.vlm.thinking``, may belong to the checkpoint's class and
    be unknown to the recipe's class. The recipe is therefore parsed without them first.

    Args:
        parser: Parser with the commands.
        words: Words of the command line, beginning with the command.
    """
    typed = [plain_name(name) for name, _ in options(words)]
    if MODEL[0] not in typed or any(name in typed for name in ("help", "model.vlm", "model.vlm.class_path")):
        return list(words)
    reduced: list[str] = []
    at: int | None = None  # index of the VLM's first argument
    dropped = False
    for number, word in enumerate(words):
        name, equals, _ = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            own = plain_name(name).startswith("model.vlm.")
            at = number if own and at is None else at
            dropped = (own and plain_name(name) not in MODEL) or name == "print_config"
            if not dropped:
                reduced.append(word)
            dropped = dropped and not equals
        elif not dropped:
            reduced.append(word)
        else:
            dropped = False
    vlm = parser.parse_args(reduced)[words[0]].model.init_args.get("vlm")
    found = fitting_class(vlm, words) if isinstance(vlm, Namespace) else vlm
    if found is vlm:
        return list(words)
    return [*words[:at], f"--model.vlm={json.dumps(found.as_dict())}", *words[at:]]


def fitting_class(vlm: Namespace, words: Sequence[str]) -> Namespace:
    """Returns a VLM's settings with the class that loads its checkpoint, for a command line that names no class.

    Settings that differ from the defaults of the recipe's class are kept where the new class has them.

    Args:
        vlm: Settings of the recipe with the typed model: class_path and init_args.
        words: Words of the command line.

    Returns:
        The settings; the same ones if the recipe's class is not one of the built-in families.
    """
    typed = {plain_name(name) for name, _ in options(words)}
    before = resolve_name(vlm["class_path"])
    if before not in (*BUILT_IN, Transformers):
        return vlm
    given = vlm["init_args"].as_dict()
    try:
        family = family_of(given["model"], given["revision"])
    except ArgumentError:  # the class itself reports the error
        own = {name.removeprefix("model.vlm.").partition(".")[0] for name in typed if name.startswith("model.vlm.")}
        if own <= signature(before).parameters.keys():
            return vlm
        family = Transformers
    if family is before:
        return vlm
    parameters = signature(before).parameters
    changed = {name: value for name, value in given.items() if value != parameters[name].default}
    kept = {name: value for name, value in changed.items() if name in signature(family).parameters}
    left = "".join(f"; {name} does not apply" for name in changed if name not in kept)
    comment = "# " if "print_config" in typed else ""  # what is printed must remain a settings file
    say(f"{comment}{given['model']} is loaded by {family.__name__}{left}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VLM, "vlm")
    path = f"{family.__module__}.{family.__qualname__}"
    parsed: Namespace = parser.parse_object({"vlm": {"class_path": path, "init_args": kept}})
    return parsed["vlm"]
