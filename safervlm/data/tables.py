"""Reads tables: TSV, CSV and JSONL files. Either all rows are read, or a one-line error rejects the table."""

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

# Delimiter of each format; JSONL has none.
TABLES = {".tsv": "\t", ".csv": ",", ".jsonl": ""}
DELIMITERS = {"\t": "a tab", ",": "a comma", ";": "a semicolon", "|": "a bar"}


def read_rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """Reads the rows of a TSV, CSV or JSONL file.

    Args:
        file: Table. Its ending, without regard to case, determines the format.

    Returns:
        For each row, the number of its first line in the file (from 1), and the text of each column. In JSONL, null
        becomes an empty text, and other values are written as JSON.

    Raises:
        RecordError: The file has another ending or can't be read completely (see :func:`read_delimited` and
            :func:`safervlm.io.reading.numbered_jsonl`).
    """
    kind = file.suffix.lower()
    if kind not in TABLES:
        raise RecordError(f"{file}: is none of {', '.join(TABLES)}: name a table, or write it as one of them")
    if kind != ".jsonl":
        return read_delimited(file, TABLES[kind])
    rows = []
    for number, record in numbered_jsonl(file):
        row = {normal_name(name): _text(value) for name, value in record.items()}
        if len(row) < len(record):
            twice = Counter(map(normal_name, record)).most_common(1)[0][0]
            raise RecordError(f"{file}, line {number}: the key {twice!r} occurs twice: rename or remove one")
        rows.append((number, row))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def read_delimited(file: Path, delimiter: str) -> list[tuple[int, dict[str, str]]]:
    """Reads the rows of a table whose first line contains the column names.

    A cell in double quotes may contain the delimiter, line ends and doubled quotes. Cells are not changed. Column names
    are normalised by :func:`safervlm.io.names.normal_name`; columns without a name are not read: a first column of
    row numbers, and empty columns. Blank lines are skipped.

    Args:
        file: Table to read.
        delimiter: Character that separates the cells.

    Returns:
        For each row, the number of its first line in the file (from 1), and the text of each column.

    Raises:
        RecordError: A quote is not closed, is closed within a cell or encloses several rows; a row has another number
            of cells than the header, or one in a column without a name; a column occurs twice; the delimiter differs;
            or there is no header. The message names the line.
    """
    rows = _parsed(file, delimiter)
    header: list[str] = []
    table = []
    folded = []  # rows that span several lines
    for number, lines, cells in rows:
        if not header:
            header = _header(file, number, cells, delimiter)
            continue
        if len(cells) != len(header):
            raise RecordError(
                f"{file}, line {number}: has {len(cells)} cells, the header has {len(header)}: a text that contains "
                f"{DELIMITERS[delimiter]}, a quote or a line end needs quotes around it"
            )
        # Only a first column of row numbers may contain cells and have no name.
        if any(cell.strip() and not name for cell, name in zip(cells[1:], header[1:], strict=True)):
            raise RecordError(
                f"{file}, line {number}: has a cell in a column without a name: name the column; a text that contains "
                f"{DELIMITERS[delimiter]} needs quotes around it"
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
                f"{file}, line {number + line - 1}: the quote that opens here encloses the next lines, which look like "
                'rows: double it (""), or, if the cell is intended, write the table as JSONL'
            )
    return [(number, {name: cell for name, cell in zip(header, cells, strict=True) if name}) for number, cells in table]


def _parsed(file: Path, delimiter: str) -> list[tuple[int, list[str], list[str]]]:
    """Returns the number of the first line, the lines and the cells of each row, including the header."""
    lines: list[str] = []  # of the current row

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
    """Returns how many lines of a row precede the last quote that opens a cell."""
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
    """Statistics of a table's columns, used to distinguish a row from a line of text.

    Args:
        rows: Cells of every row.
    """

    def __init__(self, rows: Sequence[list[str]]) -> None:
        self.count = len(rows)
        self.values = [Counter(column) for column in zip(*rows, strict=True)]
        self.numbers = [sum(n for value, n in values.items() if value.isdecimal()) for values in self.values]

    def has(self, column: int, value: str, but: list[str]) -> bool:
        """Returns whether a row other than ``but`` has this value in the column."""
        return self.values[column][value] > (but[column] == value)

    def numbered(self, column: int, but: list[str]) -> bool:
        """Returns whether every row other than ``but`` has a number in the column."""
        return self.numbers[column] - but[column].isdecimal() == self.count - 1


def _swallowed(lines: Sequence[str], cells: list[str], columns: _Columns, delimiter: str) -> int:
    """Detects a row of several lines that looks like several rows enclosed by two unrelated quotes.

    A line looks like a row if, parsed alone, it has the right number of cells and none of them begins with a blank (as
    words after a comma in a sentence do). Blank lines are ignored. The lines are considered several rows if one of
    these conditions is met:

    - every line has the right number of cells, and in some column each line has a value that other rows have there (a
      label, a category);
    - at least two lines after the first look like rows, and they are at least half of the lines after the first;
    - one line after the first looks like a row, there are at least three columns, and the line has a value that other
      rows have in that column, or a number where every other row has one;
    - the number in a line is the successor of that in the line before, in a column of numbers.

    Returns:
        The line with the opening quote, from 1; 0 if the row is valid.
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
    """Returns the cells of a line parsed alone; the quote of a line that opens or closes one is removed."""
    bare = line.rstrip("\r\n")
    pieces = next(csv.reader([bare], delimiter=delimiter), [])
    if len(pieces) != width:
        pieces = next(csv.reader([bare.replace('"', "", 1)], delimiter=delimiter), [])
    return [piece.strip('"') for piece in pieces]


def _header(file: Path, number: int, cells: list[str], delimiter: str) -> list[str]:
    if any(end in cell for cell in cells for end in "\r\n"):
        raise RecordError(
            f"{file}, line {number}: a column name continues on the next line: correct the quotes, or write all "
            "names on one line"
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
        raise RecordError(f"{file}, line {number}: the column {twice!r} occurs twice: rename or remove one")
    if not named:
        raise RecordError(f"{file}, line {number}: the first line must have the names of the columns, got {cells}")
    return header
