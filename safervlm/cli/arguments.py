"""What is checked of a command line of Lightning's before it is parsed.

The parser would overwrite, drop or misread these without a word: they are found in what was typed and in the files that
it names.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from safervlm.errors import ArgumentError
from safervlm.io.settings import flat, from_yaml, read_settings, read_yaml
from safervlm.recipes import local_or_shipped

# Shortened forms of what is typed most.
SHORT = {"limit": "data.limit"}
# Filled in by the command line; whatever stands there would be overwritten.
OVERWRITTEN = {
    "model.seed": "--seed_everything",
    "data.seed": "--seed_everything",
    "trainer.default_root_dir": "--run",
    "model.collator": "--model",
    "data.collator": "--model",
}
MAX_SEED = 2**32 - 1  # NumPy's generators take no larger one
SEEDS = {"seed", "seed_everything"}
# An empty text is a value there: no system prompt, no description.
MAY_BE_EMPTY = {"system", "about", "template"}
# Their value may be a file of settings, whatever it is called; elsewhere it is one if it ends in .yaml or .yml.
PARTS = {"config", "model", "model.vlm", "data", "data.own", "data.sets", "trainer"}


def prepared(args: Sequence[str]) -> list[str]:
    """The command line with shortened names written out and shipped recipes found.

    Args:
        args: as typed, the command first.

    Raises:
        ArgumentError: a setting that would be overwritten, an empty value, a seed that is none, or an unreadable
            configuration.
    """
    words: list[str] = []
    for word in args:
        name, equals, rest = word.partition("=")
        short = name.startswith("--") and name[2:] in SHORT
        word = local_or_shipped(f"--{SHORT[name[2:]]}{equals}{rest}" if short else word)
        if re.fullmatch(r"-\d*\.?\d+(e[+-]?\d+)?", word, re.IGNORECASE) and words and words[-1].startswith("--"):
            words[-1] += f"={word}"  # apart, the parser takes a negative number for an option
        else:
            words.append(word)
    check_words(words)
    return words


def check_words(words: Sequence[str]) -> None:
    """Rejects what the parser of a command line would overwrite, drop or misread.

    Args:
        words: of the command line, without the command or with it.

    Raises:
        ArgumentError: see :func:`prepared`.
    """
    values = {number + 1 for number, word in enumerate(words) if word.startswith("--") and "=" not in word}
    for number, word in enumerate(words):
        if not word.strip() and number not in values:
            raise ArgumentError(f"the argument {word!r} is empty; give a value, or leave it out")
    for name, value in options(words):
        check_arguments(plain_name(name), value, f"--{name}", Path(), set())


def plain_name(name: str) -> str:
    """The name of a setting without what jsonargparse puts between: ``init_args``, and ``+`` to add to a list."""
    return ".".join(part for part in name.removesuffix("+").split(".") if part not in ("init_args", "dict_kwargs"))


def check_arguments(name: str, value: Any, where: str, folder: Path, seen: set[Path]) -> None:
    """Looks at one setting, and at those within it: in a file that it names, or in JSON.

    Args:
        name: of the setting, plain; a file behind ``config`` holds settings of the top.
        value: None where there is none.
        where: it stands, for the error.
        folder: that paths may be relative to, beside the current one.
        seen: files that are looked at already.

    Raises:
        ArgumentError: see :func:`prepared`.
    """
    if instead := OVERWRITTEN.get(name):
        raise ArgumentError(f"{where} would be overwritten by {instead}; use {instead}")
    last = name.rpartition(".")[2]
    if last in SEEDS:
        check_seed(value, where)
    if not isinstance(value, str):
        return
    refuse_empty(name, value, where)
    if last in MAY_BE_EMPTY:
        return  # a text, whatever it looks like
    prefix = "" if name == "config" else name
    file = next((place for place in (folder / value, Path(value)) if os.path.exists(place)), None)  # noqa: PTH110 (a long text is no file, and no error)
    if file is not None:
        read = read_settings if name in PARTS else read_yaml if file.suffix in (".yaml", ".yml") else None
        if read is not None and file.resolve() not in seen:
            check_inside(read(file, where), prefix, value, file.parent, {*seen, file.resolve()})
    elif value.lstrip()[:1] in ("{", "[") or (name == "config" and "\n" in value):
        try:
            settings = from_yaml(value)
        except ArgumentError as error:
            raise ArgumentError(f"{where}: {error}") from None
        except (yaml.YAMLError, ValueError, RecursionError):
            return  # a text that only looks like it, or the parser says what is wrong
        check_inside(settings, prefix, where, folder, seen)


def check_inside(settings: Any, prefix: str, where: str, folder: Path, seen: set[Path]) -> None:
    """Looks at all settings of a file or of JSON; see :func:`check`."""
    for key, setting in flat(settings, prefix, lists=True):
        if key != prefix:
            check_arguments(plain_name(key), setting, f"{where}: {key}", folder, seen)


def options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The options of a command line with their values; None where there is none.

    Args:
        words: of the command line.

    Yields:
        The name without dashes, and the value.
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
    """Rejects a seed that the generators don't take.

    Args:
        value: as typed, or as read from a file; what is neither a number nor true or false is left to the parser.
        where: it stands.

    Raises:
        ArgumentError: it is out of range, or true or false: the numbers would be other ones in each run.
    """
    text = str(value)
    number = re.fullmatch(r"[+-]?\d+", text)
    if (number and not 0 <= int(text) <= MAX_SEED) or text.lower() in ("true", "false"):
        raise ArgumentError(f"{where}: a number from 0 to {MAX_SEED}, got {text}")


def refuse_empty(name: str, value: str, where: str) -> None:
    """Rejects an empty text where it isn't a value.

    Args:
        name: dotted.
        value: the text.
        where: it stands.

    Raises:
        ArgumentError: the text is empty.
    """
    if not value.strip() and name.rpartition(".")[2] not in MAY_BE_EMPTY:
        raise ArgumentError(f"{where}: {value!r} is empty; give a value, or leave it out")
