"""Output of tables on the terminal, as CSV and as Excel, with escaped texts.

:data:`JUDGE_NOTE` states that numbers and intervals disregard the judge's error. Every table and page with intervals of
uncorrected numbers shows it; next to corrected ones, :data:`BESIDE_CORRECTED`. In CSV and Excel the column ``excludes``
states it in each row.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from openpyxl.worksheet.worksheet import Worksheet
from rich.box import HEAVY_HEAD, Box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from safervlm.io.escape import for_csv, for_rich, for_terminal, for_xlsx, sheet_titles
from safervlm.io.files import write_atomically

JUDGE_NOTE = "The numbers are not corrected for the judge's error, and the intervals do not include it."
BESIDE_CORRECTED = (
    "The numbers that are not called corrected are not corrected for the judge's error, and their intervals do not "
    "include it."
)
EXCLUDED = "the judge's error"  # value of the column ``excludes``
# Workbooks: columns shown in percent; widths in characters.
SHARES = ("na_rate",)
NARROWEST, WIDEST, FILTER_BUTTON = 8, 60, 3


class TextTable(Table):
    """A table of rich whose texts are shown literally: brackets are not markup, control characters are escaped.

    Its caption is as wide as the terminal, not as the table, which may be narrow.

    Args:
        title: Title above the table.
        caption: Caption below the table; line breaks are kept.
        box: Border style of rich.
    """

    def __init__(self, title: str = "", caption: str = "", box: Box = HEAVY_HEAD) -> None:
        super().__init__(
            title=for_rich(title, "table.title") if title else None,
            caption=for_rich(caption, "table.caption", lines=True) if caption else None,
            box=box,
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        caption, self.caption = self.caption, None
        try:
            lines = [*super().__rich_console__(console, options)]
        finally:
            self.caption = caption
        yield from lines
        if caption:
            yield caption

    def add_column(self, header: object = "", *args: Any, **options: Any) -> None:
        """Adds a column; see :meth:`rich.table.Table.add_column`.

        Args:
            header: Heading, which is escaped.
            *args: Further positional arguments of rich.
            **options: Keyword arguments of rich.
        """
        super().add_column(for_rich(header), *args, **options)

    def add_row(self, *cells: object, style: Any = None, end_section: bool = False) -> None:
        """Adds a row.

        Args:
            *cells: Texts, which are escaped, or Texts of :func:`safervlm.io.escape.for_rich`, which keep their style.
            style: Style of the row.
            end_section: Whether to add a line below the row.
        """
        texts = (cell if isinstance(cell, Text) else for_rich(cell) for cell in cells)
        super().add_row(*texts, style=style, end_section=end_section)


def terminal() -> Console:
    """Returns the console of stdout; 200 columns wide outside a terminal, unless ``COLUMNS`` states another width."""
    console = Console()
    known = console.is_terminal or os.environ.get("COLUMNS", "").isdecimal()
    return console if known and console.width > 0 else Console(width=200)


def say(text: str) -> None:
    """Prints one line to stdout; control characters are escaped.

    Args:
        text: Text, which may contain names from data.
    """
    print(for_terminal(text), flush=True)


def wrapped(text: str, most: int | None = None) -> list[str]:
    """Returns the lines of a text, as wide as the terminal; control characters are escaped.

    Args:
        text: Text, which may contain names from data.
        most: Maximum number of lines; a longer text is cut and ends with an ellipsis. None for all lines.
    """
    console = terminal()
    lines = [line.plain.rstrip() for line in Text(for_terminal(text)).wrap(console, console.width)]
    if most is None or len(lines) <= most:
        return lines
    last = Text(f"{lines[most - 1]} {lines[most]}")
    last.truncate(console.width, overflow="ellipsis")
    return [*lines[: most - 1], last.plain]


def height_of_line(text: str) -> int:
    """Returns the number of lines that a terminal shows of a text that is printed without wrapping.

    Args:
        text: Text for :func:`say`.
    """
    return max(1, -(-cell_len(for_terminal(text)) // terminal().width))


def height(table: TextTable) -> int:
    """Returns the number of lines that a table takes up on the terminal.

    Args:
        table: Table to print.
    """
    return len(terminal().render_lines(table))


def show_table(table: TextTable) -> None:
    """Prints a table to stdout.

    Args:
        table: Table to print.
    """
    terminal().print(table)


def escaped(table: pd.DataFrame, escape: Callable[[str], str]) -> pd.DataFrame:
    """Returns a copy of a table whose texts (cells, column names, row names) are escaped; numbers are unchanged.

    Args:
        table: Table of numbers and texts.
        escape: Function that escapes a text for the output format.
    """

    def each(value: Any) -> Any:
        return escape(value) if isinstance(value, str) else value

    cells = {position: [each(value) for value in table.iloc[:, position]] for position in range(table.shape[1])}
    written = pd.DataFrame(cells, index=[each(name) for name in table.index])
    # A numeric column keeps its type: integers must not become floats.
    written = written.astype({position: kind for position, kind in enumerate(table.dtypes) if kind.kind in "iufb"})
    written.columns = pd.Index([each(name) for name in table.columns])
    written.index.name = table.index.name
    return written


def write_csv(path: Path, table: pd.DataFrame, index: bool = False) -> None:
    """Writes a table as CSV atomically.

    A text cell that begins like a formula gets a leading apostrophe (see :func:`safervlm.io.escape.for_csv`).

    Args:
        path: File to write.
        table: Table of numbers and texts.
        index: Whether to write the row names as a column.
    """
    write_atomically(path, lambda file: escaped(table, for_csv).to_csv(file, index=index, lineterminator="\n"))


def write_workbook(path: Path, sheets: Mapping[str, pd.DataFrame], notes: Sequence[str] = (JUDGE_NOTE,)) -> None:
    """Writes tables as the sheets of an Excel file atomically; texts are never interpreted as formulas.

    Args:
        path: File to write, ``.xlsx``.
        sheets: Title -> table.
        notes: Notes for readers of the tables, one per line of the last sheet.
    """
    tables = {**sheets, "notes": pd.DataFrame({"note": list(notes)})}

    def write(file: Path) -> None:
        with pd.ExcelWriter(file, engine="openpyxl") as writer:
            for title, table in zip(sheet_titles(list(tables)), tables.values(), strict=True):
                escaped(table, for_xlsx).to_excel(writer, sheet_name=title, index=False, freeze_panes=(1, 0))
                _format(writer.sheets[title])

    write_atomically(path, write)


def _format(sheet: Worksheet) -> None:
    """Gives a sheet filters, widths and number formats, and stores texts as texts."""
    sheet.auto_filter.ref = sheet.dimensions
    for column in sheet.iter_cols():
        lengths = []
        for cell in column:
            if isinstance(cell.value, str):  # otherwise "=1" is a formula and "#N/A" an error to openpyxl
                cell.data_type = "s"
                cell.quotePrefix = cell.value.startswith(("=", "+", "-", "@"))
                lengths.append(len(cell.value))
            elif isinstance(cell.value, int | float) and not isinstance(cell.value, bool):
                of_share = column[0].value in SHARES
                cell.number_format = "0" if isinstance(cell.value, int) else "0.0%" if of_share else "0.000"
                lengths.append(len(f"{cell.value:.3f}"))
        width = min(max([*lengths[1:], len(str(column[0].value)) + FILTER_BUTTON, NARROWEST]), WIDEST)
        sheet.column_dimensions[column[0].column_letter].width = width + 1
