"""Tables: TSV and CSV files, and JSONL read as one. All rows are read, or the table is rejected in one line."""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from safervlm.errors import RecordError
from safervlm.io.names import normal_name
from safervlm.io.reading import numbered_jsonl, text_lines

# The delimiter of each kind of table; JSONL has none.
TABLES = {".tsv": "\t", ".csv": ",", ".jsonl": ""}
DELIMITERS = {"\t": "a tab", ",": "a comma", ";": "a semicolon", "|": "a bar"}


def read_rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows of a TSV, CSV or JSONL file.

    Args:
        file: its ending, in either case, decides the kind.

    Returns:
        A row: the number of its (first) line in the file, from 1, and the text of each column. Of JSONL, null is the
        empty text, and another value is written as JSON writes it.

    Raises:
        RecordError: the ending is another one, or the file can't be read whole (see :func:`read_delimited` and
            :func:`safervlm.io.reading.numbered_jsonl`).
    """
    kind = file.suffix.lower()
    if kind not in TABLES:
        raise RecordError(f"{file}: is none of {', '.join(TABLES)}: name a table, or write it as one of them")
    if kind != ".jsonl":
        return read_delimited(file, TABLES[kind])
    return [
        (number, {normal_name(name): _text(value) for name, value in record.items()})
        for number, record in numbered_jsonl(file)
    ]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def read_delimited(file: Path, delimiter: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table whose first line has the names of the columns.

    A cell in double quotes may contain the delimiter, line ends and, doubled, quotes. Cells are not changed; names of
    columns are as :func:`safervlm.io.names.normal_name` has them, and a column without a name is not read. Blank lines
    are skipped.

    Args:
        file: the table.
        delimiter: what separates the cells.

    Returns:
        A row: the number of its first line in the file, from 1, and the text of each column.

    Raises:
        RecordError: a quote that isn't closed or is closed in the middle of a cell, a row with another number of cells
            than the header, a column that is there twice, another delimiter, or no header. The message names the line.
    """
    rows = _parsed(file, delimiter)
    header: list[str] = []
    table = []
    folded = []  # rows with a cell of several lines
    for number, lines, cells in rows:
        if not header:
            header = _header(file, number, cells, delimiter)
            continue
        if len(cells) != len(header):
            raise RecordError(
                f"{file}, line {number}: has {len(cells)} cells, the header has {len(header)}: a text that contains "
                f"{DELIMITERS[delimiter]}, a quote or a line end needs quotes around it"
            )
        table.append((number, cells))
        if len(lines) > 1:
            folded.append((number, lines, cells))
    if not header:
        raise RecordError(f"{file}: is empty: its first line must have the names of the columns")
    columns = _Columns([cells for _, cells in table])
    for number, lines, cells in folded:
        if line := _swallowed(lines, cells, columns, delimiter):
            raise RecordError(
                f"{file}, line {number + line - 1}: the quote that opens here takes in the next lines, which look like "
                'rows: double it (""), or, if the cell is meant so, write the table as JSONL'
            )
    return [(number, {name: cell for name, cell in zip(header, cells, strict=True) if name}) for number, cells in table]


def _parsed(file: Path, delimiter: str) -> list[tuple[int, list[str], list[str]]]:
    """The number of its first line, the lines, and the cells of each row, the header included."""
    lines: list[str] = []  # of the row that is being read

    def kept() -> Iterator[str]:
        for line in text_lines(file):
            lines.append(line)
            yield line

    rows = []
    before = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(kept(), delimiter=delimiter, strict=True)
        number = 1
        for cells in reader:
            if cells:
                rows.append((number, [*lines], cells))
            lines.clear()
            number = reader.line_num + 1
    except csv.Error as error:
        line = number + _opening("".join(lines), delimiter)
        raise RecordError(
            f"{file}, line {line}: the quote that opens here is not closed where its cell ends ({error}): double "
            'each quote within a cell (""), or write the table as JSONL'
        ) from None
    finally:
        csv.field_size_limit(before)
    return rows


def _opening(text: str, delimiter: str) -> int:
    """How many lines of a row stand before the last quote that opens a cell."""
    found = line = 0
    quoted, begins, place = False, True, 0
    while place < len(text):
        character = text[place]
        if quoted:
            if character == '"' and text[place + 1 : place + 2] == '"':
                place += 1
            elif character == '"':
                quoted = False
        elif character == '"' and begins:
            quoted, found = True, line
        begins = not quoted and character == delimiter
        line += character == "\n" or (character == "\r" and text[place + 1 : place + 2] != "\n")
        place += 1
    return found


class _Columns:
    """What the cells of a table's columns look like, to tell a row from a line of text.

    Args:
        rows: the cells of every row.
    """

    def __init__(self, rows: Sequence[list[str]]) -> None:
        self.count = len(rows)
        self.values = [Counter(column) for column in zip(*rows, strict=True)]
        self.numbers = [sum(n for value, n in values.items() if value.isdecimal()) for values in self.values]

    def has(self, column: int, value: str, but: list[str]) -> bool:
        """Whether another row than ``but`` has this value in the column."""
        return self.values[column][value] > (but[column] == value)

    def numbered(self, column: int, but: list[str]) -> bool:
        """Whether each row but ``but`` has a number in the column."""
        return self.numbers[column] - but[column].isdecimal() == self.count - 1


def _swallowed(lines: Sequence[str], cells: list[str], columns: _Columns, delimiter: str) -> int:
    """Whether a row of several lines looks like several rows between two quotes that don't belong together.

    A line looks like a row where it alone has the right number of cells and, mostly, none of them begins with a blank,
    as the words behind a comma in a sentence do. Blank lines say nothing. It is several rows where

    - each line has the right number of cells, and in some column each one has a value that other rows have there (a
      label, a category); or
    - two lines or more after the first one look like rows, and these are at least half of the lines; or
    - one does, of three cells or more, and has a value that other rows have in that column, or a number where every
      other row has one; or
    - the number in it follows that of the line before, in a column of numbers.

    Returns:
        Which line opens the quote, from 1; 0 for a row that is as it should be.
    """
    width = len(cells)
    if width < 2:
        return 0
    first = _opening("".join(lines), delimiter)
    apart = [_pieces(line, width, delimiter) for line in lines[first:] if line.strip()]
    every = range(width)
    following = [pieces for pieces in apart[1:] if len(pieces) == width and not any(p.startswith(" ") for p in pieces)]
    known = any(
        all(len(pieces) == width and columns.has(column, pieces[column], cells) for pieces in apart) for column in every
    )
    many = len(following) >= 2 and 2 * len(following) >= len(apart) - 1
    alike = width >= 3 and any(
        pieces[column]
        and (
            columns.has(column, pieces[column], cells)
            or (pieces[column].isdecimal() and columns.count > 1 and columns.numbered(column, cells))
        )
        for pieces in following
        for column in every
    )
    rows = [pieces for pieces in apart if len(pieces) == width]
    counted = any(
        one[column].isdecimal() and after[column] == str(int(one[column]) + 1) and columns.numbered(column, cells)
        for one, after in pairwise(rows)
        if after in following
        for column in every
    )
    return first + 1 if len(apart) > 1 and (known or many or alike or counted) else 0


def _pieces(line: str, width: int, delimiter: str) -> list[str]:
    """The cells of a line that is read alone; of the line that opens or closes a quote, without it."""
    bare = line.rstrip("\r\n")
    pieces = next(csv.reader([bare], delimiter=delimiter), [])
    if len(pieces) != width:
        pieces = next(csv.reader([bare.replace('"', "", 1)], delimiter=delimiter), [])
    return [piece.strip('"') for piece in pieces]


def _header(file: Path, number: int, cells: list[str], delimiter: str) -> list[str]:
    if any(end in cell for cell in cells for end in "\r\n"):
        raise RecordError(
            f"{file}, line {number}: the names of the columns take in the next line: correct their quotes, or write "
            "them in one line"
        )
    header = [normal_name(cell) for cell in cells]
    if len(header) == 1:
        for other, name in DELIMITERS.items():
            if other != delimiter and other in cells[0]:
                raise RecordError(
                    f"{file}, line {number}: its columns are separated by {name}; {file.suffix} needs "
                    f"{DELIMITERS[delimiter]}: save it so, or write it as JSONL"
                )
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise RecordError(f"{file}, line {number}: the column {twice!r} is there twice: rename or remove one")
    if not named:
        raise RecordError(f"{file}, line {number}: the first line must have the names of the columns, got {cells}")
    return header
