"""Sheets to be filled with labels: written as CSV and Excel, and read back."""

from collections.abc import Iterator
from pathlib import Path
from zipfile import BadZipFile

import openpyxl
import pandas as pd
from openpyxl.utils.exceptions import InvalidFileException

from safervlm.data.tables import read_rows
from safervlm.errors import RecordError, explained
from safervlm.io.names import normal_name
from safervlm.io.tables import write_csv, write_workbook
from safervlm.labelling.labels import LabelFile
from safervlm.labelling.plan import Plan
from safervlm.run_folder import RunFolder

NOTES = (
    "Fill the column label with one of the labels in the column allowed; leave it empty to do so later.",
    "Judge the answer's text only: N/A where it gives no answer to the question.",
    "The column id identifies the answer: rows may be sorted, but neither added nor changed.",
)


def write_sheets(run: Path, rows: pd.DataFrame, plan: Plan, labels: LabelFile) -> list[Path]:
    """Writes ``labels.csv`` and ``labels.xlsx``: id, question, answer, label (empty) and the allowed labels.

    Existing files may already be filled in and are not changed.

    Args:
        run: Run folder.
        rows: Result of :func:`safervlm.labelling.plan.labelable`.
        plan: The run's plan.
        labels: The run's labels, for the allowed ones.

    Returns:
        The files that were written.
    """
    texts = rows.set_index("id")
    lines = [
        (code, texts.at[name, "prompt"], texts.at[name, "response"], "", " / ".join(labels.allowed(name)))
        for code, name in plan.codes(rows).items()
    ]
    table = pd.DataFrame(lines, columns=["id", "question", "answer", "label", "allowed"])
    sheet = RunFolder(run).label_sheet
    workbook = sheet.with_suffix(".xlsx")
    written = []
    if not sheet.exists():
        write_csv(sheet, table)
        written.append(sheet)
    if not workbook.exists():
        write_workbook(workbook, {"labels": table}, NOTES)
        written.append(workbook)
    return written


def read_sheet(file: Path, rows: pd.DataFrame, plan: Plan, labels: LabelFile, rater: str) -> dict[str, str]:
    """Reads a filled sheet.

    Args:
        file: ``.csv``, ``.tsv``, ``.jsonl`` or ``.xlsx`` file with the columns id and label.
        rows: Result of :func:`safervlm.labelling.plan.labelable`.
        plan: The run's plan.
        labels: The run's labels.
        rater: Name of the person who filled it.

    Returns:
        Id -> label, of the rows with a label that the rater has not given before.

    Raises:
        RecordError: The file can't be read; a row has an unknown id, occurs twice, or has a label that is not allowed
            or differs from the one that the rater gave before. The message names file and row.
    """
    codes = plan.codes(rows)
    before = labels.by_rater.get(rater, {})
    found: dict[str, str] = {}
    seen: set[str] = set()
    for where, row in sheet_rows(file):
        if lacking := {"id", "label"} - row.keys():
            raise RecordError(f"{where}: the column {min(lacking)!r} is missing; use a sheet of `safervlm label`")
        code, label = normal_name(row["id"]), normal_name(row["label"])
        if not code and not label:
            continue
        if code not in codes:
            raise RecordError(
                f"{where}: the id {code!r} is not in the sheet of this run; rows must not be added, and each run has "
                "its own sheet"
            )
        if code in seen:
            raise RecordError(f"{where}: the id {code!r} occurs twice; remove one of the two rows")
        seen.add(code)
        if not label:
            continue
        name = codes[code]
        by_spelling = {each.casefold(): each for each in labels.allowed(name)}
        if label.casefold() not in by_spelling:
            raise RecordError(f"{where}: the label {label!r} is none of {', '.join(by_spelling.values())}; correct it")
        label = by_spelling[label.casefold()]
        if before.get(name, label) != label:
            raise RecordError(
                f"{where}: {rater!r} labelled it {before[name]!r} before, now {label!r}; correct it, or name another "
                "person with --rater"
            )
        if name not in before:
            found[name] = label
    return found


def sheet_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Iterates over the rows of a table or of the first sheet of a workbook.

    Args:
        file: The file.

    Yields:
        File and row, for error messages, and the text of each column.

    Raises:
        RecordError: The file can't be read.
    """
    if file.suffix.lower() != ".xlsx":
        yield from ((f"{file}, line {number}", row) for number, row in read_rows(file))
        return
    broken = (OSError, BadZipFile, KeyError, ValueError, InvalidFileException)
    with explained(f"{file}: can't be read as a workbook", "save it as CSV or XLSX", *broken):
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        cells = [["" if cell is None else str(cell) for cell in row] for row in book.worksheets[0].values]
        book.close()
    header = [normal_name(name) for name in cells[0]] if cells else []
    for number, row in enumerate(cells[1:], 2):
        yield f"{file}, row {number}", dict(zip(header, row, strict=False))
