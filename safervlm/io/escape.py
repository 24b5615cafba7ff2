"""Escaping of texts from data, models and file names: one function per output format.

A category, a run's name or a response may contain control characters, markup or lone surrogates. Every output passes
through one of these functions; HTML pages apply it to every value (``safervlm.reports.page.template``).
"""

import re
import unicodedata
from pathlib import Path

from rich.text import Text

from safervlm.addresses import public_text

CELL = 32_767  # the longest text of an Excel cell, in UTF-16 code units
SHOWN = 4_000  # the longest text on a page, in characters
TITLE = 31  # the longest title of an Excel sheet
_JOINERS = "\u200c\u200d"  # required by Persian and by joined emoji
_INVISIBLE = {
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
}  # control, format (including bidirectional), surrogate, line and paragraph separators
_PLAIN = re.compile(r"[ -~]*")
# Texts that spreadsheets evaluate as formulas (OWASP, CSV injection), including full-width forms.
_FORMULA = re.compile(r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20].", re.DOTALL)
_ABSOLUTE = re.compile(r"(?:file://)?/[^/\s]|[A-Za-z]:[/\\]")
_QUOTED_PATH = re.compile(
    r"""(?P<quote>["'])(?:(?:file://)?/|[A-Za-z]:[/\\])[^"'\n]*?(?P<last>[^/\\"'\n]+)[/\\]*(?P=quote)"""
)
_PATH = re.compile(
    r"""(?!(?<=[<\[◁])/[\w:-]+[>\]▷])"""  # a closing tag (</think>, [/THINK]) is not a path
    r"""(?<![\w./~:…])(?:file://)?/(?:[^/\s"']+/)*(?=[^/\s"'])"""  # /a/b/ of /a/b/c
    r"""|(?<=:)/(?!/)(?:[^/\s"']+/)+(?=[^/\s"'])"""  # name:/a/b/c, but no URL
    r"""|(?<!\w)[A-Za-z]:[/\\](?!/)(?:[^/\\\s"']+[/\\])*(?=[^/\\\s"'])"""
)
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)


def visible(text: str, keep: str = "") -> str:
    r"""Replaces each invisible character by its Python escape, such as ``\x1b`` or ``\u202e``.

    Invisible are control characters (C0, C1), line and paragraph separators, format characters (which reorder or hide
    text; the joiners of emoji and Persian are kept), lone surrogates and noncharacters.

    Args:
        text: Any text.
        keep: Invisible characters to keep, for example line breaks.

    Returns:
        A text that can be encoded in UTF-8.
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join(
        character if character in keep or not _is_invisible(character) else _escaped(character) for character in text
    )


def _is_invisible(character: str) -> bool:
    number = ord(character)
    noncharacter = number & 0xFFFE == 0xFFFE or 0xFDD0 <= number <= 0xFDEF
    return noncharacter or (unicodedata.category(character) in _INVISIBLE and character not in _JOINERS)


def _escaped(character: str) -> str:
    if character in "\n\r\t":
        return {"\n": r"\n", "\r": r"\r", "\t": r"\t"}[character]
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def for_terminal(text: object, lines: bool = False) -> str:
    """Escapes a text for the terminal, where an escape sequence could move the cursor or clear the screen.

    Addresses are shown without their secrets (:func:`safervlm.addresses.public_text`).

    Args:
        text: Object whose ``str`` is shown.
        lines: Whether to keep line breaks; if False, the result is one line.
    """
    return visible(public_text(str(text)), keep="\n" if lines else "")


def for_rich(text: object, style: str = "", lines: bool = False) -> Text:
    """Escapes a text for rich's cells, titles and prints: brackets are not markup, ``:x:`` is not an emoji.

    Args:
        text: Object whose ``str`` is shown.
        style: Style of rich, such as ``bold``.
        lines: Whether to keep line breaks.
    """
    return Text(for_terminal(text, lines), style=style)


def for_csv(text: str) -> str:
    """Escapes a text cell of a CSV file: one line, not evaluated by spreadsheets.

    As OWASP recommends, a text that begins like a formula (``=``, ``+``, ``-``, ``@``, tab, line break) gets a leading
    apostrophe. A single such character is not a formula and is not changed.

    Args:
        text: Text of the cell; numbers must not be passed.
    """
    return ("'" if _FORMULA.match(text) else "") + visible(text)


def for_xlsx(text: str) -> str:
    """Escapes a text cell of an Excel file: no characters that XML rejects, and at most 32,767 UTF-16 code units.

    The cell must have the data type of a text (:func:`safervlm.io.tables.write_workbook`), so that it is not a formula.
    ``_x0041_`` is how Excel encodes a character in its files; it is escaped so that it is shown literally.

    Args:
        text: Text of the cell; if it is too long, it is cut and marked.
    """
    text = re.sub(r"_(?=x[0-9A-Fa-f]{4}_)", "_x005F_", visible(text, keep="\n\t"))
    if _units(text) <= CELL:
        return text
    mark = f" [cut: {len(text):,} characters]"
    return _cut(text, CELL - len(mark)) + mark


def sheet_titles(names: list[str]) -> list[str]:
    r"""Returns valid, distinct titles of an Excel workbook's sheets.

    A title has at most 31 characters and none of ``[]:*?/\``. Titles differ also when compared case-insensitively.

    Args:
        names: Requested titles, in order.
    """
    titles: list[str] = []
    for name in names:
        title = _cut(re.sub(r"[\[\]:*?/\\]", "_", visible(name)), TITLE).strip("'") or "_"
        number, unique = 1, title
        while unique.casefold() in {"history", *(each.casefold() for each in titles)}:  # Excel reserves "History"
            number += 1
            unique = _cut(title, TITLE - len(f" {number}")) + f" {number}"
        titles.append(unique)
    return titles


def for_latex(text: str) -> str:
    r"""Escapes a text for LaTeX.

    Args:
        text: Text. A leading ``[`` or ``*`` is put in braces: after ``\\`` LaTeX would interpret it as an argument.
    """
    text = visible(text).translate(_LATEX)
    return f"{{{text[0]}}}{text[1:]}" if text.startswith(("[", "*")) else text


def for_html(text: str) -> str:
    """Makes a text's invisible characters visible for a page, before Jinja escapes its markup.

    Args:
        text: Text. Line breaks and tabs are kept; beyond 4,000 characters it is cut and marked.
    """
    mark = f" [cut: {len(text):,} characters]"
    return visible(text, keep="\n\t") if len(text) <= SHOWN else visible(text[:SHOWN], keep="\n\t") + mark


def without_folders(text: str) -> str:
    """Reduces the absolute paths in a text to their last component, as they may contain a user's name.

    ``/home/me/runs/base`` becomes ``…/base``. URLs and relative paths are kept.

    Args:
        text: Text, which may be a path or contain some.
    """
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"(?<![\w./]){re.escape(home)}(?![\w.-])", "~", text)
    if _ABSOLUTE.match(text) and "\n" not in text and " /" not in text:  # the text is one path, maybe with spaces
        return "…/" + re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    text = _QUOTED_PATH.sub(r"\g<quote>…/\g<last>\g<quote>", text)
    return _PATH.sub("…/", text)


def for_figure(text: str, longest: int = 40) -> str:
    """Escapes and shortens a label of a figure to one line.

    Args:
        text: Label.
        longest: Maximum number of characters.
    """
    text = visible(text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


def _cut(text: str, units: int) -> str:
    """Returns the longest prefix of a text with at most ``units`` UTF-16 code units, without splitting a character."""
    return text.encode("utf-16-le")[: 2 * units].decode("utf-16-le", "ignore")
