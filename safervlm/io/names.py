"""Normalisation of names (ids, images, categories, concepts, labels): spellings that look the same are the same name.

Prompts and responses are free text and are never changed. A name may contain control characters or markup; they are
escaped wherever the name is printed or written to a page or table.
"""

import re
import unicodedata
from collections.abc import Sequence

from safervlm.addresses import is_address, public
from safervlm.errors import ArgumentError

# Characters that are invisible everywhere: soft hyphen, zero-width space, word joiner, byte order mark, operators of
# formulas, separators and fillers of Mongolian and Korean, grapheme joiner.
INVISIBLE = "\u00ad\u200b\u2060\ufeff\u2061\u2062\u2063\u2064\u180e\u115f\u1160\u3164\uffa0\u034f"
# Zero-width joiners and directional marks: they affect the display inside a word, but not at its ends.
AT_THE_ENDS = "\u200c\u200d\u200e\u200f\u061c"
# The same characters between ASCII characters, and variation selectors after ASCII letters: they have no effect there.
WITHOUT_EFFECT = re.compile(rf"(?<=[ -~])[{AT_THE_ENDS}]+(?=[ -~])|(?<=[A-Za-z])[\ufe00-\ufe0f]+")


def normal_name(text: str) -> str:
    """Returns the normal spelling of a name.

    Unicode's composed form (NFC), without leading and trailing white space, with plain spaces instead of non-breaking
    and other spaces, and without invisible characters. Case is kept.

    Args:
        text: Name as spelled in a file or argument.
    """
    if text.isascii() and text.isprintable():  # most names; there may be a million
        return text.strip()
    text = unicodedata.normalize("NFC", text.translate(dict.fromkeys(map(ord, INVISIBLE))))
    text = "".join(" " if unicodedata.category(character) == "Zs" else character for character in text)
    text = WITHOUT_EFFECT.sub("", text)
    while (stripped := text.strip().strip(AT_THE_ENDS)) != text:
        text = stripped
    return text


def not_empty(argument: str, text: str) -> str:
    """Returns the text of an argument unchanged, if it is not empty.

    Args:
        argument: Name of the argument, for the error message.
        text: Text of the argument.

    Raises:
        ArgumentError: The text is empty or only white space.
    """
    if not text.strip():
        raise ArgumentError(f"{argument}: must not be empty, got {text!r}: give a value, or omit the argument")
    return text


def path_text(argument: str, text: str) -> str:
    """Returns the text of an argument that names a file or folder unchanged, if it can be a path.

    Args:
        argument: Name of the argument, for the error message.
        text: Text of the argument.

    Raises:
        ArgumentError: The text is empty, contains a NUL character, or is an address.
    """
    if "\0" in not_empty(argument, text):
        raise ArgumentError(f"{argument}: {text!r} can't be a path: remove the zero character")
    if is_address(text):
        raise ArgumentError(
            f"{argument}: {public(text.strip())} is an address, not a path: download it, and name the copy"
        )
    return text


def set_name(argument: str, text: str) -> str:
    """Returns the normalised name of a dataset, the first part of its records' ids.

    Args:
        argument: Name of the argument, for the error message.
        text: Name of the dataset.

    Raises:
        ArgumentError: The name is empty, ``.`` or ``..``, or contains a slash, which would make ids ambiguous.
    """
    name = normal_name(text)
    if "/" in name or name in ("", ".", ".."):
        raise ArgumentError(f"{argument}: a name without a slash, got {text!r}")
    return name


def label_names(argument: str, values: Sequence[object]) -> tuple[str, ...]:
    """Returns labels of a YAML file as normalised texts.

    YAML parses ``yes``, ``no``, ``null`` and ``2024-01-01`` without quotes as values of other types, and does not keep
    the original spelling. A number is formatted by ``str``.

    Args:
        argument: Name of the argument, for the error message.
        values: Labels as parsed by YAML.

    Raises:
        ArgumentError: A value is neither a text nor a number, or is an empty text.
    """
    texts = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ArgumentError(
                f"{argument}: YAML reads one of the labels as {value!r}, which is not a text: put it in quotes, as in "
                '["yes"]'
            )
        texts.append(normal_name(not_empty(argument, str(value))))
    return tuple(texts)
