"""Texts from data, models and file names, made safe for where they are shown: one function for each output format.

A category, a run's name or an answer may contain control characters, markup or half of a surrogate pair. Every output
passes through one of these functions; HTML pages do it for every value (``safervlm.reports.page.template``).
"""

import re
import unicodedata
from pathlib import Path

from rich.text import Text

CELL = 32_767  # the longest text of an Excel cell, in UTF-16 code units
SHOWN = 4_000  # the longest text on a page, in characters
TITLE = 31  # the longest title of an Excel sheet
_JOINERS = "\u200c\u200d"  # Persian and joined emoji need them
_INVISIBLE = {
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
}  # control, format (bidirectional, too), surrogate, line and paragraph breaks
_PLAIN = re.compile(r"[ -~]*")
# What spreadsheets compute (OWASP, CSV injection), the full-width forms included.
_FORMULA = re.compile(r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20].", re.DOTALL)
_ABSOLUTE = re.compile(r"(?:file://)?/[^/\s]|[A-Za-z]:[/\\]")
_QUOTED_PATH = re.compile(
    r"""(?P<quote>["'])(?:(?:file://)?/|[A-Za-z]:[/\\])[^"'\n]*?(?P<last>[^/\\"'\n]+)[/\\]*(?P=quote)"""
)
_PATH = re.compile(
    r"""(?<![\w./~:…])(?:file://)?/(?:[^/\s"']+/)*(?=[^/\s"'])"""  # /a/b/ of /a/b/c
    r"""|(?<=:)/(?!/)(?:[^/\s"']+/)+(?=[^/\s"'])"""  # name:/a/b/c, but no address
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
    r"""A text without invisible characters: each is written as its Python escape, such as ``\x1b`` or ``\u202e``.

    These are control characters (C0, C1), line and paragraph separators, format characters (which reorder or hide
    text; the joiners of emoji and Persian stay), lone surrogates and noncharacters.

    Args:
        text: any text.
        keep: invisible characters that stay, for example line breaks.

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
    """A text for the terminal, where an escape sequence would move the cursor or clear the screen.

    Args:
        text: anything that can be written as a text.
        lines: whether line breaks stay; False makes one line of it.
    """
    return visible(str(text), keep="\n" if lines else "")


def for_rich(text: object, style: str = "", lines: bool = False) -> Text:
    """A text for a cell, title or print of rich: brackets are no markup, ``:x:`` is no emoji.

    Args:
        text: anything that can be written as a text.
        style: of rich, such as ``bold``.
        lines: whether line breaks stay.
    """
    return Text(for_terminal(text, lines), style=style)


def for_csv(text: str) -> str:
    """A text cell of a CSV file: one line, and nothing that a spreadsheet would run.

    As OWASP recommends, a text that begins like a formula (``=``, ``+``, ``-``, ``@``, tab, line break) gets a leading
    apostrophe. A single such character is no formula and stays. Numbers are not texts and don't come here.
    """
    return ("'" if _FORMULA.match(text) else "") + visible(text)


def for_xlsx(text: str) -> str:
    r"""A text cell of an Excel file: characters that XML rejects are visible, and at most 32,767 UTF-16 code units.

    The cell must have the data type of a text (:func:`safervlm.io.tables.write_workbook`), which no formula has.
    ``_x0041_`` is how Excel writes a character in its files; it is escaped so that it stays as it is.
    """
    text = re.sub(r"_(?=x[0-9A-Fa-f]{4}_)", "_x005F_", visible(text, keep="\n\t"))
    if _units(text) <= CELL:
        return text
    mark = f" [cut: {len(text):,} characters]"
    return _cut(text, CELL - len(mark)) + mark


def sheet_titles(names: list[str]) -> list[str]:
    r"""Titles of an Excel workbook's sheets: at most 31 characters, none of ``[]:*?/\``, all different in any case."""
    titles: list[str] = []
    for name in names:
        title = _cut(re.sub(r"[\[\]:*?/\\]", "_", visible(name)), TITLE).strip("'") or "_"
        number, unique = 1, title
        while unique.casefold() in {"history", *(each.casefold() for each in titles)}:  # Excel keeps "History"
            number += 1
            unique = _cut(title, TITLE - len(f" {number}")) + f" {number}"
        titles.append(unique)
    return titles


def for_latex(text: str) -> str:
    r"""A text in LaTeX. A leading ``[`` or ``*`` is in braces: after ``\\`` it would be an argument."""
    text = visible(text).translate(_LATEX)
    return f"{{{text[0]}}}{text[1:]}" if text.startswith(("[", "*")) else text


def for_html(text: str) -> str:
    """A text for a page, before Jinja escapes the markup in it: at most 4,000 characters; line breaks and tabs stay."""
    mark = f" [cut: {len(text):,} characters]"
    return visible(text, keep="\n\t") if len(text) <= SHOWN else visible(text[:SHOWN], keep="\n\t") + mark


def without_folders(text: str) -> str:
    """A text whose absolute paths are reduced to their last part, as they may contain a user's name.

    ``/home/me/runs/base`` becomes ``…/base``. Addresses and relative paths stay.
    """
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"(?<![\w./]){re.escape(home)}(?![\w.-])", "~", text)
    if _ABSOLUTE.match(text) and "\n" not in text and " /" not in text:  # a path alone, maybe with spaces
        return "…/" + re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    text = _QUOTED_PATH.sub(r"\g<quote>…/\g<last>\g<quote>", text)
    return _PATH.sub("…/", text)


def for_figure(text: str, longest: int = 40) -> str:
    """A label of a figure: one line that leaves room for the figure.

    Args:
        text: the label.
        longest: how many characters of it are shown.
    """
    text = visible(text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


def _cut(text: str, units: int) -> str:
    """The beginning of a text, at most so many UTF-16 code units, without half a character."""
    return text.encode("utf-16-le")[: 2 * units].decode("utf-16-le", "ignore")
