"""Settings as they stand in YAML and JSON: read strictly, and flattened to dotted keys."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from safervlm.errors import ArgumentError, UserError, first_line
from safervlm.io.reading import text_lines

LARGEST = 100_000  # values of a configuration, each alias counted as what it stands for


class StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, which also rejects keys that stand twice, as a value would be lost, and alias bombs."""

    def get_single_node(self) -> Any:
        """The document, before anything is built of it.

        Raises:
            ArgumentError: its aliases stand for more than :data:`LARGEST` values, or for themselves.
        """
        node = super().get_single_node()
        sizes: dict[int, int] = {}
        if node is not None and _size(node, sizes) > max(LARGEST, 2 * len(sizes)):  # a large file is no bomb
            raise ArgumentError(f"its aliases (*name) stand for more than {LARGEST:,} values; write the values out")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping.

        Args:
            node: its YAML node.
            deep: whether values are built at once.

        Raises:
            ArgumentError: a key stands twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise ArgumentError(
                        f"line {key.start_mark.line + 1}: the key {key.value!r} stands there twice; leave one out"
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for; more than the largest for one that holds itself."""
    if id(node) not in sizes:
        sizes[id(node)] = LARGEST + 1  # until it is known: who meets it within itself
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        sizes[id(node)] = 1 + sum(_size(each, sizes) for each in inner)
    return sizes[id(node)]


def from_yaml(text: str) -> Any:
    """What a YAML or JSON text holds.

    Raises:
        ArgumentError: a key stands twice, or its aliases stand for too much.
        yaml.YAMLError: it is no YAML.
        RecursionError: it is nested too deeply.
    """
    return yaml.load(text, StrictLoader)  # noqa: S506 (a safe loader)


def read_yaml(file: Path, option: str = "", error: type[UserError] = ArgumentError) -> Any:
    """What a YAML or JSON file holds.

    Args:
        file: to read.
        option: that names it, for the error.
        error: the class of the error.

    Raises:
        UserError: it can't be read, a key stands twice, or its aliases stand for too much.
    """
    where = f"{option}: {file}" if option else str(file)
    if not file.is_file():
        raise error(f"{option}{': ' if option else ''}{str(file)!r} is no file; name one, as configs/measure.yaml")
    try:
        text = "".join(text_lines(file)).removeprefix("\ufeff")
    except UserError as cause:
        raise error(f"{option}{': ' if option else ''}{cause}") from None
    try:
        return from_yaml(text)
    except UserError as cause:
        raise error(f"{where}, {cause}") from None
    except RecursionError as cause:
        raise error(f"{where} is nested too deeply; a recipe has a few levels") from cause
    except (yaml.YAMLError, ValueError) as cause:  # a date such as 2024-13-45 is a ValueError
        mark = getattr(cause, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(cause, "problem", None) or first_line(cause)
        raise error(f"{where}{place}: not YAML ({problem}); correct the line") from cause


def read_settings(file: Path, option: str = "", error: type[UserError] = ArgumentError) -> dict[str, Any]:
    """A configuration file as plain data; see :func:`read_yaml`.

    Raises:
        UserError: it can't be read, or is no mapping.
    """
    settings = read_yaml(file, option, error)
    if not isinstance(settings, Mapping):
        kind = "is empty" if settings is None else f"holds a {type(settings).__name__}"
        raise error(
            f"{option}{': ' if option else ''}{file} {kind}, and no settings; name a recipe, for example "
            "configs/measure.yaml"
        )
    return dict(settings)


def flat(settings: Any, prefix: str = "", lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted keys with their values.

    Args:
        settings: mappings in mappings.
        prefix: of all keys.
        lists: whether the items of a list have keys of their own, which end in their number; else a list is a value.

    Yields:
        A key and its value.
    """
    inner: Any = None
    if isinstance(settings, Mapping):
        inner = settings.items()
    elif lists and isinstance(settings, Sequence) and not isinstance(settings, str | bytes):
        inner = enumerate(settings)
    if inner is None:
        yield prefix, settings
    else:
        for key, value in inner:
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key), lists)
