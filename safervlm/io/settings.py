"""Settings in YAML and JSON: strict parsing, and flattening to dotted keys."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from safervlm.errors import ArgumentError, UserError, first_line
from safervlm.io.reading import parse_json, text_encoding, text_lines

LARGEST_PART = 1_000_000  # bytes of a file that a configuration includes
LARGEST = 100_000  # maximum number of values of a configuration, with aliases expanded


class StrictLoader(yaml.SafeLoader):
    """YAML's safe loader that also rejects duplicate keys, of which one value would be lost, and alias bombs."""

    # As in jsonargparse, dates are texts: what is checked must be what is used.
    yaml_implicit_resolvers = {  # noqa: RUF012 (as the base class declares it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> Any:
        """Returns the root node of the document, before any object is constructed.

        Raises:
            ArgumentError: The aliases expand to more than :data:`LARGEST` values, or are recursive.
        """
        node = super().get_single_node()
        sizes: dict[int, float] = {}
        if node is not None and _size(node, sizes) > max(LARGEST, 2 * len(sizes)):  # a large file is accepted
            raise ArgumentError(
                f"its aliases (*name) expand to more than {LARGEST:,} values; write them without aliases"
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Composes a mapping as it is written, before PyYAML inserts the values of merge keys (``<<``) into it.

        Args:
            anchor: Anchor of the mapping, if any.

        Raises:
            ArgumentError: A key is duplicated, also in another spelling of the same value, such as yes and true.
        """
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # rejected when it is constructed
            names = {key.value}  # 1 and "1" are the same setting, too
            if key.tag != "tag:yaml.org,2002:merge":
                names.add(self.construct_object(key))
            if names & seen:
                raise ArgumentError(
                    f"line {key.start_mark.line + 1}: the key {key.value!r} occurs twice; leave one out"
                )
            seen |= names
        return node


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Returns the number of values that a node expands to; infinity if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # until the size is known; a node that contains itself keeps this value
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        sizes[id(node)] = 1 + sum(_size(each, sizes) for each in inner)
    return sizes[id(node)]


def from_yaml(text: str) -> Any:
    """Parses a YAML or JSON text.

    Args:
        text: Text of the document.

    Returns:
        The value; None for an empty text.

    Raises:
        ArgumentError: A key is duplicated, or aliases expand to too many values.
        yaml.YAMLError: The text is not YAML.
        RecursionError: The document is nested too deeply.
    """
    return yaml.load(text, StrictLoader)  # noqa: S506 (a safe loader)


def read_yaml(file: Path, option: str = "", error: type[UserError] = ArgumentError) -> Any:
    """Reads a YAML or JSON file.

    Args:
        file: File to read.
        option: Option that names the file, for the error message.
        error: Class of the error to raise.

    Returns:
        The value; None for an empty file.

    Raises:
        UserError: The file can't be read or parsed, a key is duplicated, or aliases expand to too many values.
    """
    where = f"{option}: {file}" if option else str(file)
    if not file.is_file():
        raise error(
            f"{option}{': ' if option else ''}{str(file)!r} is not a file; name one, such as configs/measure.yaml"
        )
    try:
        text = "".join(text_lines(file)).removeprefix("\ufeff")
    except UserError as cause:
        raise error(f"{option}{': ' if option else ''}{cause}") from None
    with file.open("rb") as content:
        encoding = text_encoding(content.read(4))
    if not encoding.startswith("utf-8"):  # the parser can't read it
        name = encoding.upper()
        raise error(f"{where} isn't in UTF-8, but in {name}; convert it, for example by iconv -f {name} -t UTF-8")
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


def read_part(file: Path, option: str) -> Any:
    """Reads a file that may contain settings, whatever its ending; the parser reads any file in the place of a class.

    Args:
        file: Existing file.
        option: Option that names the file, for the error message.

    Returns:
        The settings; None if the file contains none.

    Raises:
        ArgumentError: A key is duplicated, or aliases expand to too many values.
    """
    if file.suffix in (".yaml", ".yml"):
        return read_yaml(file, option)
    try:
        text = file.read_bytes().decode("utf-8-sig") if file.stat().st_size <= LARGEST_PART else ""
    except (OSError, UnicodeDecodeError):
        return None
    try:
        try:
            json.loads(text)  # many times faster than YAML
        except ValueError:
            part = from_yaml(text)
        else:
            part = parse_json(text, str(file), "leave one out", finite=False)
    except UserError as error:
        raise ArgumentError(f"{option}: {file}, {str(error).removeprefix(f'{file}: ')}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return part if isinstance(part, Mapping | list) else None


def read_settings(file: Path, option: str = "", error: type[UserError] = ArgumentError) -> dict[str, Any]:
    """Reads a configuration file as a dictionary; see :func:`read_yaml`.

    Args:
        file: File to read.
        option: Option that names the file, for the error message.
        error: Class of the error to raise.

    Raises:
        UserError: The file can't be read or parsed, or is not a mapping.
    """
    settings = read_yaml(file, option, error)
    if not isinstance(settings, Mapping):
        kind = "is empty" if settings is None else f"contains a {type(settings).__name__}"
        raise error(
            f"{option}{': ' if option else ''}{file} {kind}, and no settings; name a recipe, for example "
            "configs/measure.yaml"
        )
    return dict(settings)


def flat(settings: Any, prefix: str = "", lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Flattens nested settings to dotted keys.

    Args:
        settings: Nested mappings.
        prefix: Prefix of all keys.
        lists: Whether the items of a list get keys that end in their index; if False, a list is a value.

    Yields:
        Pairs of key and value.
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
