"""Rejects invalid values that the parser accepts: null where a value is needed, and values instead of settings."""

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from safervlm.errors import ArgumentError


def reject_nulls(settings: Mapping[str, Any]) -> None:
    """Rejects null for an argument whose type does not allow it, and other values where settings are needed.

    Args:
        settings: Parsed settings of a command.

    Raises:
        ArgumentError: An argument is null, or has another value where settings are needed; the message names it.
    """
    trainer = settings.get("trainer") or {}  # the parser checks its own arguments, and loggers get a folder later
    parts = {
        "model": settings.get("model"),
        "data": settings.get("data"),
        "trainer.callbacks": trainer.get("callbacks"),
    }
    for part, given in parts.items():
        for name, hint in _nulls(given, part):
            kind = getattr(hint, "__name__", str(hint).replace("typing.", "").replace("collections.abc.", ""))
            raise ArgumentError(f"--{name}: null is not a valid value, it needs {kind}; give one, or omit it")


def _nulls(value: Any, name: str, hints: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """Yields name and type of each argument that is null and may not be."""
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from _nulls(each, f"{name}.{number}")
    if not isinstance(value, Mapping):
        return
    if "class_path" in value and "init_args" in value:
        yield from _nulls(value["init_args"], name, types_of(value["class_path"]))
        return
    for key, inner in value.items():
        hint = (hints or {}).get(key)
        if inner is None and hint is not None and not allows_null(hint):
            yield f"{name}.{key}", hint
        kinds = tuple(kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind))
        if kinds and not isinstance(inner, (Mapping, NoneType, *kinds)):
            raise ArgumentError(f"--{name}.{key}: settings are needed, got {inner!r:.80}; give some, or omit it")
        yield from _nulls(inner, f"{name}.{key}", types_of(hint) if isinstance(hint, type) else None)


def types_of(kind: str | type) -> dict[str, Any]:
    """Returns the types of the arguments of a class, including those that it passes to its base classes.

    Args:
        kind: Class, or its dotted path.

    Returns:
        Name -> type; empty for a class whose types can't be resolved, and without arguments whose default is null.
    """
    try:
        found: Any = resolve_name(kind) if isinstance(kind, str) else kind
        hints: dict[str, Any] = {}
        for base in reversed(found.__mro__):
            own = base.__dict__.get("__init__")
            if getattr(own, "__annotations__", None):
                hints |= get_type_hints(own)
                defaults = getattr(own, "__defaults__", None) or ()
                names = own.__code__.co_varnames[: own.__code__.co_argcount][-len(defaults) or len(hints) :]
                hints |= {name: Any for name, default in zip(names, defaults, strict=False) if default is None}
    except Exception:  # foreign code: an annotation may name what is not imported
        return {}
    return hints


def allows_null(hint: Any) -> bool:
    """Returns whether a type allows None.

    Args:
        hint: Type, as an annotation states it.
    """
    if hint in (Any, None, NoneType, object) or isinstance(hint, TypeVar):
        return True
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(map(allows_null, get_args(hint)))
    if origin is Annotated:
        return allows_null(get_args(hint)[0])
    return origin is Literal and None in get_args(hint)
