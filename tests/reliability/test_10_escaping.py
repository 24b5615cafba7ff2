"""Promise 10, escaping: any name can be shown in every output format, and read back by that format's parser."""

import csv
import io
import re

import openpyxl
import pytest
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
from rich.console import Console
from rich.table import Table

from safervlm.io import escape

# name -> (a text from data, its visible form)
HOSTILE = {
    "clear screen": ("\x1b[2J\x1b[H", r"\x1b[2J\x1b[H"),
    "C1 CSI": ("a\x9b31mred", r"a\x9b31mred"),
    "vertical tab": ("knives\x0band guns", r"knives\x0band guns"),
    "NUL": ("a\x00b", r"a\x00b"),
    "carriage return": ("100 % right\r0", r"100 % right\r0"),
    "bell and backspace": ("\a\b\b", r"\x07\x08\x08"),
    "delete": ("a\x7f", r"a\x7f"),
    "right-to-left override": ("\u202egnp.exe", r"\u202egnp.exe"),
    "isolates": ("\u2066a\u2069", r"\u2066a\u2069"),
    "line separator": ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
    "high surrogate": ("a\ud83d", r"a\ud83d"),
    "low surrogate": ("\ude00b", r"\ude00b"),
    "noncharacter": ("a\uffff\ufdd0", r"a\uffff\ufdd0"),
    "byte order mark": ("\ufeffSafe", r"\ufeffSafe"),
    "zero width": ("Sa\u200bfe", r"Sa\u200bfe"),
    "tag": ("a\U000e0041", r"a\U000e0041"),
    "markup": ("ppo[seed 0][/bold][link=x]", "ppo[seed 0][/bold][link=x]"),
    "emoji code": ("a:x:b :warning:", "a:x:b :warning:"),
    "trailing backslash": ("[bold]\\", "[bold]\\"),
    "formula": ('=HYPERLINK("http://x","y")', '=HYPERLINK("http://x","y")'),
    "command": ("+cmd|' /C calc'!A0", "+cmd|' /C calc'!A0"),
    "at": ("@SUM(1+1)", "@SUM(1+1)"),
    "minus": ("-2+3", "-2+3"),
    "full-width formula": ("\uff1d1+1", "\uff1d1+1"),
    "error code": ("#N/A", "#N/A"),
    "character code": ("_x0041_ _x000D_", "_x0041_ _x000D_"),
    "quote and comma": ('a",b;c', 'a",b;c'),
    "LaTeX": (r"\input{/etc/passwd} 50% $x_1^2$ a&b #1 ~", r"\input{/etc/passwd} 50% $x_1^2$ a&b #1 ~"),
    "script": ("</script><script>alert(1)</script>", "</script><script>alert(1)</script>"),
    "emoji": ("👩‍🔬 😀", "👩‍🔬 😀"),
    "Persian": ("می‌خواهم", "می‌خواهم"),
    "Hebrew": ("שלום", "שלום"),
}
cases = pytest.mark.parametrize(("text", "shown"), HOSTILE.values(), ids=HOSTILE)


@cases
def test_terminal_text_is_escaped_into_one_line(text: str, shown: str) -> None:
    assert escape.for_terminal(text) == shown
    shown.encode()  # no lone surrogate is left


def test_terminal_line_breaks_are_kept_only_if_requested() -> None:
    assert escape.for_terminal("a\nb\tc") == r"a\nb\tc"
    assert escape.for_terminal("a\nb\x1b", lines=True) == "a\nb\\x1b"


@cases
def test_a_rich_table_shows_every_character(text: str, shown: str) -> None:
    table = Table(title=escape.for_rich(text))
    table.add_column(escape.for_rich(text))
    table.add_row(escape.for_rich(text))
    file = io.StringIO()
    Console(file=file, width=200).print(table)
    assert file.getvalue().count(shown) == 3


@cases
def test_csv_formulas_are_neutralised(text: str, shown: str) -> None:
    file = io.StringIO()
    csv.writer(file).writerow([escape.for_csv(text), "next"])
    (row,) = csv.reader(io.StringIO(file.getvalue()))
    assert row == [("'" if text[0] in "=+-@\uff1d" else "") + shown, "next"]


@pytest.mark.parametrize("text", ["\t=1", "\r=1", "\n=1"])
def test_csv_formulas_after_white_space_are_neutralised(text: str) -> None:
    assert escape.for_csv(text).startswith("'")


@pytest.mark.parametrize("text", ["-", "+", "a=b", "'=1", "none: x", ""])
def test_csv_leaves_other_texts(text: str) -> None:
    assert escape.for_csv(text) == text


@cases
def test_xlsx_text_has_no_illegal_characters_and_reads_back(text: str, shown: str) -> None:
    written = escape.for_xlsx(text)
    assert not ILLEGAL_CHARACTERS_RE.search(written)
    # The text that Excel shows (ECMA-376, ST_Xstring).
    assert re.sub(r"_x([0-9A-Fa-f]{4})_", lambda code: chr(int(code[1], 16)), written) == shown


@pytest.mark.parametrize("text", ["a" * 40_000, "😀" * 20_000, "\x1b" * 10_000, "a" * 32_766 + "😀"])
def test_xlsx_text_is_truncated_to_the_cell_limit(text: str) -> None:
    written = escape.for_xlsx(text)
    assert len(written.encode("utf-16-le")) // 2 <= 32_767
    assert written.endswith("characters]")


def test_xlsx_text_of_exactly_the_cell_limit_is_not_truncated() -> None:
    assert escape.for_xlsx("a" * 32_767) == "a" * 32_767


def test_sheet_titles_are_valid_and_different() -> None:
    names = ["a/b", "a?b", "A_B", "x" * 40, "x" * 50, "", "'quoted'", "History", "😀" * 20, "a\x00b"]
    titles = escape.sheet_titles(names)
    assert len({title.casefold() for title in titles}) == len(names)
    book = openpyxl.Workbook()
    for title in titles:
        assert len(title.encode("utf-16-le")) // 2 <= 31
        assert not title.startswith("'")
        assert not title.endswith("'")
        assert book.create_sheet(title).title == title  # openpyxl rejects or renames what Excel doesn't take


def unescaped_latex(text: str) -> str:
    """Parses LaTeX; fails on a special character that is not escaped."""
    named = {
        "textbackslash": "\\",
        "textasciitilde": "~",
        "textasciicircum": "^",
        "textless": "<",
        "textgreater": ">",
        "textbar": "|",
    }
    read, place = "", 0
    while place < len(text):
        if command := re.compile(r"\\([a-z]+)\{\}").match(text, place):
            read += named[command[1]]
        elif command := re.compile(r"\\([&%$#_{}])").match(text, place) or re.compile(r"\{([\[*])\}").match(
            text, place
        ):
            read += command[1]
        else:
            command = re.compile(r"[^\\{}&%$#_~^<>|]").match(text, place)
            assert command, f"{text[place:]!r} is not escaped"
            read += command[0]
        place = command.end()
    return read


@cases
def test_escaped_latex_is_read_back(text: str, shown: str) -> None:
    assert unescaped_latex(escape.for_latex(text)) == shown


@pytest.mark.parametrize("text", ["[seed 0]", "*", "[", "*[x]"])
def test_latex_names_are_not_parsed_as_arguments_of_a_line_break(text: str) -> None:
    written = escape.for_latex(text)
    assert written.startswith("{")
    assert unescaped_latex(written) == text


def test_a_page_keeps_line_breaks() -> None:
    assert escape.for_html("a\n\tb\x1b\ud83d") == "a\n\tb\\x1b\\ud83d"


def test_a_figure_has_short_labels() -> None:
    assert escape.for_figure("x" * 41) == "x" * 39 + "…"
    assert escape.for_figure("$x$ \x00") == r"$x$ \x00"
