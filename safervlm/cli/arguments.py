"""Checks of a Lightning command line before it is parsed.

The parser would silently overwrite, drop or misinterpret the settings that are rejected here. They are looked up in
the typed arguments and in the files that these name.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from safervlm.errors import ArgumentError
from safervlm.io.names import path_text
from safervlm.io.settings import flat, from_yaml, read_part, read_settings
from safervlm.io.trust import PATHS
from safervlm.recipes import local_or_shipped

# Short form -> full name, for arguments that are often typed.
SHORT = {"limit": "data.limit"}
# Settings that the command line fills in, so that a given value would be overwritten -> the option to use instead.
OVERWRITTEN = {
    "model.seed": "--seed_everything",
    "data.seed": "--seed_everything",
    "trainer.default_root_dir": "--run",
    "model.collator": "--model",
    "data.collator": "--model",
}
MAX_SEED = 2**32 - 1  # the largest seed that NumPy's generators accept
SEEDS = {"seed", "seed_everything"}
# Settings for which an empty text is a valid value: no system prompt, no description.
MAY_BE_EMPTY = {"system", "about", "template"}
# Environment variables that Lightning reads as numbers.
RANKS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE")
# Sections of a configuration. An empty section would discard the settings of the files before it.
SECTIONS = ("model", "data", "trainer")
# Keys that the configuration of a class may have.
OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")
# If the value of one of these arguments is an existing file, it must be a settings file. The value of another argument,
# unless it names data, may be one.
PARTS = {"config", "model", "model.vlm", "data", "data.own", "data.sets", "trainer"}


def prepared(args: Sequence[str]) -> list[str]:
    """Returns the command line with short names expanded and shipped recipes resolved, after checking it.

    Args:
        args: Words as typed, beginning with the command.

    Raises:
        ArgumentError: A setting would be overwritten, a value is empty, a seed is invalid, or a configuration is
            unreadable.
    """
    words: list[str] = []
    for word in args:
        name, equals, rest = word.partition("=")
        short = name.startswith("--") and name[2:] in SHORT
        word = local_or_shipped(f"--{SHORT[name[2:]]}{equals}{rest}" if short else word)
        if re.fullmatch(r"-\d*\.?\d+(e[+-]?\d+)?", word, re.IGNORECASE) and words and words[-1].startswith("--"):
            words[-1] += f"={word}"  # otherwise the parser treats a negative number as an option
        else:
            words.append(word)
    check_words(words)
    check_environment()
    return words


def check_words(words: Sequence[str]) -> None:
    """Rejects arguments that the parser of a command line would overwrite, drop or misinterpret.

    Args:
        words: Words of the command line, with or without the command.

    Raises:
        ArgumentError: See :func:`prepared`.
    """
    values = {number + 1 for number, word in enumerate(words) if word.startswith("--") and "=" not in word}
    if words and words[-1] == "--":
        raise ArgumentError("nothing follows the argument '--'; omit it")
    for number, word in enumerate(words):
        if not word.strip() and number not in values:
            raise ArgumentError(f"the argument {word!r} is empty; give a value, or omit it")
    for word in takewhile(lambda word: not word.startswith("-"), words):  # run folders
        path_text("the argument", word)
    for name, value in options(words):
        check_arguments(plain_name(name), value, f"--{name}", Path(), set())


def check_environment() -> None:
    """Rejects numbers of processes that Lightning could not read from the environment, where torchrun sets them.

    Raises:
        ArgumentError: A variable is not a number.
    """
    for name in RANKS:
        if not re.fullmatch(r"\d{1,9}", value := os.environ.get(name, "0")):
            raise ArgumentError(
                f"the environment variable {name}: a number, as torchrun sets it, got {value!r}; unset it"
            )


def plain_name(name: str) -> str:
    """Returns the name of a setting without ``init_args``, ``dict_kwargs`` and the trailing ``+`` of jsonargparse.

    Args:
        name: Dotted name as typed or as in a file.
    """
    return ".".join(part for part in name.removesuffix("+").split(".") if part not in ("init_args", "dict_kwargs"))


def check_arguments(name: str, value: Any, where: str, folder: Path, seen: set[Path]) -> None:
    """Checks one setting and those nested in it, in a file that it names or in JSON.

    Args:
        name: Plain name of the setting; a file given as ``config`` has top-level settings.
        value: Value of the setting; None if it has none.
        where: Location of the setting, for the error message.
        folder: Folder to resolve relative paths against, besides the current one.
        seen: Files that are already checked.

    Raises:
        ArgumentError: See :func:`prepared`.
    """
    if instead := OVERWRITTEN.get(name):
        raise ArgumentError(f"{where} would be overwritten by {instead}; use {instead}")
    last = name.rpartition(".")[2]
    if last in SEEDS:
        check_seed(value, where)
    if last == "limit" and re.fullmatch(r"0+|-\d+", str(value).strip()):
        raise ArgumentError(f"{where}: at least 1{', or null' if name != last else ''}, got {value}")
    if not isinstance(value, str):
        return
    reject_empty(name, value, where)
    if name == "run":
        path_text(where, value)
    if "\0" in value:
        raise ArgumentError(f"{where}: {value[:80]!r} contains a zero character; remove it")
    if last in MAY_BE_EMPTY:
        return  # free text, even if it looks like a file or JSON
    prefix = "" if name == "config" else name
    file = next((place for place in (folder / value, Path(value)) if os.path.exists(place)), None)  # noqa: PTH110 (a long text is not a file, and not an error)
    if file is not None:
        yaml_file = file.suffix in (".yaml", ".yml")
        read = read_settings if name in PARTS else read_part if yaml_file or last not in PATHS else None
        if read is not None and (name in PARTS or yaml_file or file.is_file()) and file.resolve() not in seen:
            check_inside(read(file, where), prefix, value, file.parent, {*seen, file.resolve()})
    elif value.lstrip()[:1] in ("{", "[") or (name == "config" and "\n" in value):
        try:
            settings = from_yaml(value)
        except ArgumentError as error:
            raise ArgumentError(f"{where}: {error}") from None
        except (yaml.YAMLError, ValueError, RecursionError):
            return  # a text that only looks like JSON, or an error that the parser reports
        check_inside(settings, prefix, where, folder, seen)


def check_inside(settings: Any, prefix: str, where: str, folder: Path, seen: set[Path]) -> None:
    """Checks all settings of a file or of JSON; see :func:`check_arguments`.

    Args:
        settings: Parsed settings.
        prefix: Dotted name that the settings are nested in; empty for top-level settings.
        where: Location of the settings, for the error message.
        folder: Folder to resolve relative paths against.
        seen: Files that are already checked.

    Raises:
        ArgumentError: See :func:`prepared`.
    """
    check_kinds(settings, prefix, where)
    names: set[str] = set()
    for key, setting in flat(settings, prefix, lists=True):
        if key == prefix:
            continue
        if key in names:
            raise ArgumentError(f"{where}: {key} occurs twice, nested and with dots; leave one out")
        names.add(key)
        check_arguments(plain_name(key), setting, f"{where}: {key}", folder, seen)


def check_kinds(settings: Any, name: str, where: str) -> None:
    """Rejects settings of a wrong type that the parser would accept as those of a class, or reject without naming them.

    Args:
        settings: Parsed settings.
        name: Dotted name that the settings are nested in; empty for top-level settings.
        where: Location of the settings, for the error message.

    Raises:
        ArgumentError: A section or the arguments of a class are not settings, the path of a class is not a text or has
            other keys next to it, or the name of an argument is not a text.
    """
    for item in settings if isinstance(settings, list) else ():
        check_kinds(item, name, where)
    if not isinstance(settings, Mapping):
        return
    section, arguments = not name, name.endswith(("init_args", "dict_kwargs"))
    beside = [key for key in settings if key not in OF_A_CLASS] if isinstance(settings.get("class_path"), str) else []
    if beside:
        raise ArgumentError(
            f"{where}: {f'{name}.' if name else ''}{beside[0]} is next to a class_path, where only "
            f"{' and '.join(OF_A_CLASS[1:])} may be; write the arguments of the class into init_args"
        )
    for key, value in settings.items():
        whole = f"{name}.{key}" if name else str(key)
        if not isinstance(key, str) and (section or arguments):
            raise ArgumentError(f"{where}: the name {key!r} is not a text; name an argument, such as model or data")
        if (section and key in SECTIONS) or key in ("init_args", "dict_kwargs"):
            if not isinstance(value, Mapping | str):
                raise ArgumentError(
                    f"{where}: {whole}: settings are needed, got {value!r:.80}; give some, or omit {key}"
                )
        elif key == "class_path" and not isinstance(value, str):
            raise ArgumentError(f"{where}: {whole}: the path of a class is needed, got {value!r:.80}; name one")
        check_kinds(value, whole, where)


def options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Iterates over the options of a command line with their values.

    Args:
        words: Words of the command line.

    Yields:
        The name without dashes, and the value; None if it has none.
    """
    for number, word in enumerate(words):
        if not word.startswith("--") or word == "--":
            continue
        name, equals, value = word[2:].partition("=")
        if equals:
            yield name, value
        else:
            following = words[number + 1] if number + 1 < len(words) else None
            yield name, None if following is None or following.startswith("--") else following


def check_seed(value: Any, where: str) -> None:
    """Rejects a seed that the random generators don't accept.

    Args:
        value: Value as typed, or as read from a file; other texts than numbers, true and false are left to the parser.
        where: Location of the seed, for the error message.

    Raises:
        ArgumentError: The seed is out of range, or is true or false, for which each run would use different random
            numbers.
    """
    text = str(value).strip()
    try:
        number = int(text) if re.fullmatch(r"[+-]?\d+", text) else from_yaml(text)  # 0x10 and 1_000, as the parser does
    except (ArgumentError, yaml.YAMLError, ValueError, RecursionError):
        return
    if isinstance(number, bool) or (isinstance(number, int) and not 0 <= number <= MAX_SEED):
        raise ArgumentError(f"{where}: a number from 0 to {MAX_SEED}, got {text[:80]}")


def reject_empty(name: str, value: str, where: str) -> None:
    """Rejects an empty text for a setting that may not be empty.

    Args:
        name: Dotted name of the setting.
        value: Text.
        where: Location of the setting, for the error message.

    Raises:
        ArgumentError: The text is empty or white space.
    """
    if not value.strip() and name.rpartition(".")[2] not in MAY_BE_EMPTY:
        raise ArgumentError(f"{where}: {value!r} is empty; give a value, or omit it")
