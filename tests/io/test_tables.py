"""Tables written to files: numbers stay numeric, texts stay text, and a file is complete or absent."""

import csv
import io

import numpy as np
import openpyxl
import pandas as pd
import pytest
from rich.console import Console

from safervlm.io.tables import (
    EXCLUDED,
    JUDGE_NOTE,
    TextTable,
    escaped,
    height,
    say,
    show_table,
    terminal,
    wrapped,
    write_csv,
    write_workbook,
)

TABLE = pd.DataFrame(
    {
        "=name": ["@SUM(1)", "-", None],
        "whole": [1, -2, 3],
        "share": [-0.25, np.nan, 1.0],
        "yes": [True, False, True],
        "mixed": ["-5", 7, -8.5],
    },
    index=["+a", "b", "b"],
)


def test_numbers_keep_their_type_and_value():
    written = escaped(TABLE, str.upper)
    assert written.columns.tolist() == ["=NAME", "WHOLE", "SHARE", "YES", "MIXED"]
    assert written.index.tolist() == ["+A", "B", "B"]
    for name in ("whole", "share", "yes"):
        pd.testing.assert_series_equal(
            written[name.upper()].reset_index(drop=True), TABLE[name].reset_index(drop=True), check_names=False
        )
    assert written["MIXED"].tolist() == ["-5", 7, -8.5]
    assert TABLE.columns[0] == "=name"  # the table itself is not changed


def test_an_empty_table_has_its_headings(tmp_path):
    write_csv(tmp_path / "empty.csv", pd.DataFrame(columns=["=a", "b"]))
    assert (tmp_path / "empty.csv").read_text() == "'=a,b\n"


def test_csv_neutralises_formulas_in_texts_and_keeps_numbers(tmp_path):
    write_csv(tmp_path / "table.csv", TABLE.rename_axis("run"), index=True)
    rows = list(csv.reader((tmp_path / "table.csv").open(newline="")))
    assert rows == [
        ["run", "'=name", "whole", "share", "yes", "mixed"],
        ["'+a", "'@SUM(1)", "1", "-0.25", "True", "'-5"],
        ["b", "-", "-2", "", "False", "7"],
        ["b", "", "3", "1.0", "True", "-8.5"],
    ]


def test_a_workbook_has_texts_numbers_and_notes(tmp_path):
    write_workbook(tmp_path / "book.xlsx", {"a/b": TABLE, "A?B": TABLE[["whole"]]}, [JUDGE_NOTE, "=1+1"])
    book = openpyxl.load_workbook(tmp_path / "book.xlsx")
    assert book.sheetnames == ["a_b", "A_B 2", "notes"]
    first = [[cell.value for cell in row] for row in book["a_b"].iter_rows()]
    assert first[1:] == [["@SUM(1)", 1, -0.25, True, "-5"], ["-", -2, None, False, 7], [None, 3, 1, True, -8.5]]
    types = {
        cell.value: cell.data_type for row in book["a_b"].iter_rows() for cell in row if isinstance(cell.value, str)
    }
    assert set(types.values()) == {"s"}
    assert book["a_b"]["A1"].value == "=name"
    assert book["a_b"]["A1"].quotePrefix
    assert [cell.value for cell in book["notes"]["A"]] == ["note", JUDGE_NOTE, "=1+1"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_csv(tmp_path / "table.csv", TABLE)
    before = (tmp_path / "table.csv").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="No space left"):
        write_csv(tmp_path / "table.csv", TABLE)
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert (tmp_path / "table.csv").read_bytes() == before


def test_a_table_on_the_terminal_shows_brackets_and_line_breaks():
    table = TextTable(title="[bold]runs[/bold] :x:", caption="one\ntwo\x1b")
    table.add_column("[a]")
    table.add_row("b\nc")
    table.add_row("a cell that is as wide as the title")
    console = Console(file=io.StringIO(), width=60)
    console.print(table)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert lines[0] == "[bold]runs[/bold] :x:"
    assert lines[-2:] == ["one", r"two\x1b"]
    assert any("[a]" in line for line in lines)
    assert any(r"b\nc" in line for line in lines)


def test_a_caption_is_as_wide_as_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    words = [f"word{number:02}" for number in range(40)]
    table = TextTable(title="T", caption=f"{' '.join(words)}\nanother line")
    table.add_column("x")
    table.add_row("1")
    show_table(table)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == height(table)
    assert lines[-4:] == [" ".join(words[:14]), " ".join(words[14:28]), " ".join(words[28:]), "another line"]
    assert max(map(len, lines[:-4])) < 10
    assert "word39" in str(table.caption)


def test_say_escapes_control_characters_into_one_line(capsys):
    say("a\nb\x1b[2J")
    assert capsys.readouterr().out == "a\\nb\\x1b[2J\n"


def test_judge_note_contains_the_exclusion_sentence():
    assert EXCLUDED in JUDGE_NOTE


@pytest.mark.parametrize(
    ("columns", "width"), [("20", 20), ("1", 1), ("0", 200), ("", 200), ("-5", 200), ("x", 200), (None, 200)]
)
def test_the_width_of_a_console_that_is_no_terminal(
    columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert terminal().width == width
    print("\n".join(wrapped("a text of some words")))
    assert "".join(capsys.readouterr().out.split()) == "atextofsomewords"
