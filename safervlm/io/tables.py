"""Tables as they leave the program: on the terminal, as CSV and as Excel, their texts escaped.

What the judge's error means for a table is one sentence, :data:`JUDGE_NOTE`, which every table and page with intervals
states. In CSV and Excel the column ``excludes`` says it of each row.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import HEAVY_HEAD, Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from safervlm.io.escape import for_csv, for_rich, for_terminal, for_xlsx, sheet_titles
from safervlm.io.files import write_atomically

JUDGE_NOTE = "The intervals do not include the judge's error."
EXCLUDED = "the judge's error"  # the value of the column ``excludes``


class TextTable(Table):
    """A table of rich that shows its texts as they are: brackets are no markup, control characters are visible.

    Args:
        title: above the table.
        caption: below it; line breaks stay.
        box: of rich, the lines around the cells.
    """

    def __init__(self, title: str = "", caption: str = "", box: Box = HEAVY_HEAD) -> None:
        super().__init__(
            title=for_rich(title, "table.title") if title else None,
            caption=for_rich(caption, "table.caption", lines=True) if caption else None,
            box=box,
        )

    def add_column(self, header: object = "", *args: Any, **options: Any) -> None:
        """Adds a column; see :meth:`rich.table.Table.add_column`."""
        super().add_column(for_rich(header), *args, **options)

    def add_row(self, *cells: object, style: Any = None, end_section: bool = False) -> None:
        """Adds a row of texts, which a Text of :func:`safervlm.io.escape.for_rich` may be already, with its style."""
        texts = (cell if isinstance(cell, Text) else for_rich(cell) for cell in cells)
        super().add_row(*texts, style=style, end_section=end_section)


def terminal() -> Console:
    """The terminal; a file or a pipe has no width of its own, and a table is not broken there."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=200)


def say(text: str) -> None:
    """Prints one line that may contain names from data."""
    print(for_terminal(text), flush=True)


def show_table(table: TextTable) -> None:
    """Prints a table."""
    terminal().print(table)


def escaped(table: pd.DataFrame, escape: Callable[[str], str]) -> pd.DataFrame:
    """A table whose texts (cells, headings, row names) are escaped; numbers stay numbers."""

    def each(value: Any) -> Any:
        return escape(value) if isinstance(value, str) else value

    cells = {position: [each(value) for value in table.iloc[:, position]] for position in range(table.shape[1])}
    written = pd.DataFrame(cells, index=[each(name) for name in table.index])
    # A column without a text keeps its type: 3 is not 3.0.
    written = written.astype({position: kind for position, kind in enumerate(table.dtypes) if kind.kind in "iufb"})
    written.columns = pd.Index([each(name) for name in table.columns])
    written.index.name = table.index.name
    return written


def write_csv(path: Path, table: pd.DataFrame, index: bool = False) -> None:
    """Writes a table as CSV, whole or not at all.

    A text cell that begins like a formula gets a leading apostrophe (see :func:`safervlm.io.escape.for_csv`).

    Args:
        path: the file.
        table: numbers and texts.
        index: whether the row names are a column.
    """
    write_atomically(path, lambda file: escaped(table, for_csv).to_csv(file, index=index))


def write_workbook(path: Path, sheets: Mapping[str, pd.DataFrame], notes: Sequence[str] = (JUDGE_NOTE,)) -> None:
    """Writes tables as the sheets of an Excel file, whole or not at all; texts stay texts, whatever they begin with.

    Args:
        path: the file, ``.xlsx``.
        sheets: title -> table.
        notes: what a reader of the tables has to know, a line each: the last sheet.
    """
    tables = {**sheets, "notes": pd.DataFrame({"note": list(notes)})}

    def write(file: Path) -> None:
        with pd.ExcelWriter(file, engine="openpyxl") as writer:
            for title, table in zip(sheet_titles(list(tables)), tables.values(), strict=True):
                escaped(table, for_xlsx).to_excel(writer, sheet_name=title, index=False, freeze_panes=(1, 0))
                for row in writer.sheets[title].iter_rows():
                    for cell in row:
                        if isinstance(cell.value, str):  # openpyxl takes "=1" for a formula, "#N/A" for an error
                            cell.data_type = "s"
                            cell.quotePrefix = cell.value.startswith(("=", "+", "-", "@"))

    write_atomically(path, write)
