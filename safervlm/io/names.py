"""Names of categories, concepts, labels and sets: two spellings that look the same are the same name.

Prompts and answers are free text and are never changed. A name may contain control characters or markup: where it is
printed or written into a page or table, that place escapes it.
"""

import unicodedata
from collections.abc import Sequence

from safervlm.errors import ArgumentError

# Characters that are not seen wherever they stand: soft hyphen, zero-width space, word joiner, byte order mark.
INVISIBLE = "\u00ad\u200b\u2060\ufeff"
# Zero-width joiners and marks of direction: within a word they decide what is seen, at its ends they don't.
AT_THE_ENDS = "\u200c\u200d\u200e\u200f\u061c"


def normal_name(text: str) -> str:
    """The one spelling of a name.

    Unicode's composed form (NFC), without white space at either end, with plain spaces in place of non-breaking and
    other spaces, and without characters that are not seen. Upper and lower case stay apart.

    Args:
        text: as it stands in a file or argument.
    """
    text = unicodedata.normalize("NFC", text).translate(dict.fromkeys(map(ord, INVISIBLE)))
    text = "".join(" " if unicodedata.category(character) == "Zs" else character for character in text)
    while (stripped := text.strip().strip(AT_THE_ENDS)) != text:
        text = stripped
    return text


def not_empty(argument: str, text: str) -> str:
    """The text of an argument.

    Raises:
        ArgumentError: it is empty, or all of it is white space.
    """
    if not text.strip():
        raise ArgumentError(f"{argument}: must not be empty, got {text!r}: give a value, or leave the argument out")
    return text


def path_text(argument: str, text: str) -> str:
    """The text of an argument that names a file or folder.

    Raises:
        ArgumentError: it is empty, or can't be a path.
    """
    if "\0" in not_empty(argument, text):
        raise ArgumentError(f"{argument}: {text!r} can't be a path: remove the zero character")
    return text


def set_name(argument: str, text: str) -> str:
    """The name of a set, the first part of its records' ids, in its one spelling.

    Raises:
        ArgumentError: it is empty, or would make ids ambiguous.
    """
    name = normal_name(text)
    if "/" in name or name in ("", ".", ".."):
        raise ArgumentError(f"{argument}: a name without a slash, got {text!r}")
    return name


def label_names(argument: str, values: Sequence[object]) -> tuple[str, ...]:
    """Labels of a YAML file as texts, each in its one spelling.

    YAML takes ``yes``, ``no``, ``null`` and ``2024-01-01`` without quotes for something else than a text, and doesn't
    keep what was written. A number is written as Python writes it.

    Raises:
        ArgumentError: a value that isn't a text or number, or is an empty text.
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
