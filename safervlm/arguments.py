"""What is checked of a command line of Lightning's before it is parsed.

The parser would overwrite, drop or misread these without a word: they are found in what was typed and in the files that
it names.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safervlm.errors import ArgumentError, RecordError
from safervlm.reading import read_yaml
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
# An empty text is a value there: no system prompt, no description.
MAY_BE_EMPTY = {"system", "about", "template"}


def prepared(args: Sequence[str]) -> list[str]:
    """The command line with shortened names written out and shipped recipes found.

    Args:
        args: as typed, the command first.

    Raises:
        ArgumentError: a setting that would be overwritten, an empty value, or an unreadable configuration.
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
    for name, value in options(words):
        plain = name.replace(".init_args", "")
        if value is not None:
            refuse_empty(plain, value, f"--{name}")
            if plain == "seed_everything":
                check_seed(value)
            if plain == "config" or (plain in ("model", "data", "trainer") and Path(value).suffix in (".yaml", ".yml")):
                settings = read_config(Path(value), f"--{name}")
                inside = settings if plain == "config" else {plain: settings}
                for key, setting in flat(inside):
                    where = f"{value}: {key}"
                    refuse_overwritten(key.replace(".init_args", ""), where)
                    if isinstance(setting, str):
                        refuse_empty(key, setting, where)
        refuse_overwritten(plain, f"--{name}")
    return words


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


def check_seed(value: str) -> None:
    """Rejects a seed that the generators don't take.

    Args:
        value: as typed; what is no number is left to the parser.

    Raises:
        ArgumentError: the number is out of range.
    """
    if re.fullmatch(r"-?\d+", value) and not 0 <= int(value) <= MAX_SEED:
        raise ArgumentError(f"--seed_everything: from 0 to {MAX_SEED}, got {value}")


def refuse_overwritten(name: str, where: str) -> None:
    """Rejects a setting that the command line fills in.

    Args:
        name: dotted, without ``init_args``.
        where: it stands.

    Raises:
        ArgumentError: it is one.
    """
    if instead := OVERWRITTEN.get(name):
        raise ArgumentError(f"{where} would be overwritten by {instead}; use {instead}")


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


def read_config(file: Path, option: str) -> dict[str, Any]:
    """A configuration file, to look for what would be overwritten; a file that isn't there is left to the parser.

    Args:
        file: a YAML.
        option: that names it, for the error.

    Raises:
        ArgumentError: it can't be read, is no mapping, or a key stands twice.
    """
    if not file.exists():
        return {}
    if not file.is_file():
        raise ArgumentError(f"{option}: {str(file)!r} is no file; name a recipe, as configs/measure.yaml")
    try:
        settings = read_yaml(file)
    except RecordError as error:
        raise ArgumentError(f"{option}: {error}") from None
    if not isinstance(settings, Mapping):
        kind = "is empty" if settings is None else f"holds a {type(settings).__name__}"
        raise ArgumentError(
            f"{option}: {file} {kind}, and no settings; name a recipe, for example configs/measure.yaml"
        )
    return dict(settings)


def flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted keys with their values."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(settings, list):
        for value in settings:
            yield from flat(value, prefix)
    else:
        yield prefix, settings
