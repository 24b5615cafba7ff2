"""Promise 2, tables: all rows are read, or the table is rejected in one line with the file and line number."""

import codecs
import json
from pathlib import Path

import pandas as pd
import pytest

from safervlm.data.tables import read_rows
from safervlm.errors import RecordError

HEAD = "text,label\n"
GOOD = [{"text": "Yes.", "label": "Safe"}, {"text": "Nein, «nie»", "label": "Unsafe"}]
PLAIN = 'text,label\nYes.,Safe\n"Nein, «nie»",Unsafe\n'

# Valid tables: the content, and the rows.
READ = {
    "plain": ("a.csv", PLAIN.encode(), GOOD),
    "ending in capitals": ("a.CSV", PLAIN.encode(), GOOD),
    "byte order mark": ("a.csv", codecs.BOM_UTF8 + PLAIN.encode(), GOOD),
    "UTF-16, little end first": ("a.csv", codecs.BOM_UTF16_LE + PLAIN.encode("utf-16-le"), GOOD),
    "UTF-16, big end first": ("a.csv", codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"), GOOD),
    "UTF-32": ("a.csv", PLAIN.encode("utf-32"), GOOD),
    "CR LF": ("a.csv", PLAIN.replace("\n", "\r\n").encode(), GOOD),
    "CR alone": ("a.csv", PLAIN.replace("\n", "\r").encode(), GOOD),
    "no line end at the end": ("a.csv", PLAIN.strip().encode(), GOOD),
    "blank lines": ("a.csv", PLAIN.replace("\n", "\n\n").encode(), GOOD),
    "tabs": ("a.tsv", PLAIN.replace(",Safe", "\tSafe").replace(",U", "\tU").replace("t,l", "t\tl").encode(), GOOD),
    "blanks around the columns' names": ("a.csv", PLAIN.replace("text,label", " text ,\u00a0label").encode(), GOOD),
    "a column without a name": ("a.csv", b",text,label\n0,Yes.,Safe\n", GOOD[:1]),
    "line ends in a cell": ("a.csv", b'text,label\n"a\r\nb\rc\nd",Safe\n', [{"text": "a\r\nb\rc\nd", "label": "Safe"}]),
    "quotes in a cell": ("a.csv", b'text,label\n"say ""no""",Safe\n', [{"text": 'say "no"', "label": "Safe"}]),
    "a quote within a word": ("a.csv", b'text,label\n5" wide,Safe\n', [{"text": '5" wide', "label": "Safe"}]),
    "a text of several lines": (
        "a.csv",
        b'text,label\n"Yes, it is\nNo, not quite\nWell, so",Safe\nno,Unsafe\n',
        [{"text": "Yes, it is\nNo, not quite\nWell, so", "label": "Safe"}, {"text": "no", "label": "Unsafe"}],
    ),
    "lists in a text, the label first": (
        "a.csv",
        b'label,text\nSafe,"1. knives, forks\n2. cups, plates\n3. pans, pots"\nSafe,no\n',
        [
            {"label": "Safe", "text": "1. knives, forks\n2. cups, plates\n3. pans, pots"},
            {"label": "Safe", "text": "no"},
        ],
    ),
    "texts of several lines in a wide table": (
        "a.csv",
        b'id,label,text\n1,Safe,"One, two, three:\n\n- a, b\n- Safe, I think, mostly\n\nSo, no."\n2,Safe,"a\nb,c"\n',
        [
            {
                "id": "1",
                "label": "Safe",
                "text": "One, two, three:\n\n- a, b\n- Safe, I think, mostly\n\nSo, no.",
            },
            {"id": "2", "label": "Safe", "text": "a\nb,c"},
        ],
    ),
    "separators that end no line": (
        "a.csv",
        "text,label\na\u2028b\u2029c\x85d\x0be\x0cf\x1cg,Safe\n".encode(),
        [{"text": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg", "label": "Safe"}],
    ),
    "a cell of 300,000 characters": (
        "a.csv",
        b"text,label\n" + b"no " * 100_000 + b",Safe\n",
        [{"text": "no " * 100_000, "label": "Safe"}],
    ),
    "blanks in a free text": ("a.csv", b"text,label\n  a  , Safe \n", [{"text": "  a  ", "label": " Safe "}]),
    "JSONL with a mark": ("a.jsonl", codecs.BOM_UTF8 + b'{"text": "a", "n": 1}\n', [{"text": "a", "n": "1"}]),
    "JSONL, CR alone": ("a.jsonl", b'{"n": 1}\r{"n": 2}\r', [{"n": "1"}, {"n": "2"}]),
    "JSONL, U+2028": ("a.jsonl", '{"t": "a\u2028b"}\n'.encode(), [{"t": "a\u2028b"}]),
    "JSONL, half a surrogate": ("a.jsonl", b'{"t": "\\ud83d!"}\n', [{"t": "\ud83d!"}]),
    "JSONL, other values": ("a.jsonl", b'{"t": true, "n": null, "x": 1.0, "l": [1]}\n', None),
}


@pytest.mark.parametrize("case", READ)
def test_all_rows_are_read_as_they_are(tmp_path: Path, case: str) -> None:
    name, content, expected = READ[case]
    file = tmp_path / name
    file.write_bytes(content)
    rows = [row for _, row in read_rows(file)]
    assert rows == (expected or [{"t": "true", "n": "", "x": "1.0", "l": "[1]"}])


ROWS_HEAD = b"id,label,text\n"
ROWS = b"".join(b"%d,Safe,answer %d\n" % (number, number) for number in range(2, 31))
# Invalid tables: the content, the line that the error names, and the rest of the error.
REJECTED = {
    "JSONL, two names that are one": ("a.jsonl", b'{"n": 1}\n{"label": 1, "label ": 0}\n', 2, "'label' occurs twice"),
    "a text with a comma and a trailing one": ("a.csv", b"text,label,\na,Safe,\nno, it is,Safe\n", 3, "without a name"),
    "a cell without a name": ("a.tsv", b"text\t\tlabel\na\t\tSafe\nb\tc\tSafe\n", 3, "without a name"),
    "an old workbook": ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(20), None, "old Excel workbook"),
    "bzip2": ("a.jsonl", b"BZh91AY&SY" + bytes(9), None, "bunzip2"),
    "xz": ("a.csv", b"\xfd7zXZ\0" + bytes(9), None, "unxz"),
    "a database": ("a.csv", b"SQLite format 3\0", None, "SQLite"),
    "a pointer of Git LFS": (
        "a.csv",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        None,
        "git lfs pull",
    ),
    "Windows-1252": ("a.csv", HEAD.encode() + b"a,Safe\ncaf\xe9,Safe\n", 3, "iconv -f WINDOWS-1252 -t UTF-8"),
    "Windows-1252, CR LF": ("a.csv", b"text,label\r\na,Safe\r\n\x93no\x94,Safe\r\n", 3, "byte 0x93"),
    "UTF-16 without a mark": ("a.csv", PLAIN.encode("utf-16-le"), 1, "iconv -f UTF-16LE"),
    "UTF-16, the other way round": ("a.csv", PLAIN.encode("utf-16-be"), 1, "iconv -f UTF-16BE"),
    "UTF-16, cut in a character": ("a.csv", PLAIN.encode("utf-16")[:-1], 3, "save it as UTF-8"),
    "a zero byte": ("a.csv", HEAD.encode() + b"a,Safe\nb\0c,Safe\n", 3, r"NUL \(zero\) byte"),
    "a quote that isn't closed": ("a.csv", HEAD.encode() + b'a,Safe\n"b,Safe\nc,Safe\n', 3, "not closed"),
    "a quote closed in a cell": ("a.csv", HEAD.encode() + b'"b" c,Safe\n', 2, "quote"),
    "two quotes that don't belong together": (
        "a.csv",
        HEAD.encode() + b'a,Safe\nx,Unsafe\n"b,Safe\nc,Unsafe\nd,Safe\ne",Unsafe\nf,Safe\n',
        4,
        "look like rows",
    ),
    "the same in two lines": ("a.csv", HEAD.encode() + b'a,Safe\n"b,Safe\ne",Safe\nf,Safe\n', 3, "look like rows"),
    "the same with tabs": ("a.tsv", b'q\tlabel\na\tno\n"b\tyes\nc\tno\nd"\tyes\ne\tyes\n', 3, "look like rows"),
    "opened in row 2, closed 30 rows later": (
        "a.csv",
        ROWS_HEAD + b'1,Safe,"hello\n' + ROWS + b'31,Safe,bye"\n32,Safe,x\n',
        2,
        "look like rows",
    ),
    "the same with tabs and CR LF": (
        "a.tsv",
        (ROWS_HEAD + b'1,Safe,"hello\n' + ROWS + b'31,Safe,bye"\n32,Safe,x\n')
        .replace(b",", b"\t")
        .replace(b"\n", b"\r\n"),
        2,
        "look like rows",
    ),
    "the same with a row of two lines in it": (
        "a.csv",
        ROWS_HEAD + b'1,Safe,"hello\n' + ROWS + b'20,Safe,a\nb\n31,Safe,bye"\n32,Safe,x\n',
        2,
        "look like rows",
    ),
    "blank lines between the rows": (
        "a.csv",
        ROWS_HEAD + b'1,Safe,"hello\n\n2,Safe,b\n\n3,Safe,bye"\n4,Safe,x\n',
        2,
        "look like rows",
    ),
    "another row with a comma too many": (
        "a.csv",
        ROWS_HEAD + b'1,Safe,"hello\n2,Safe,b, c\n3,Safe,bye"\n4,Safe,x\n',
        2,
        "look like rows",
    ),
    "doubled quotes between": (
        "a.csv",
        ROWS_HEAD + b'1,Safe,"hello\n2,Safe,""x\ny""\n3,Safe,bye"\n4,Safe,x\n',
        2,
        "look like rows",
    ),
    "other labels, numbered rows": (
        "a.csv",
        ROWS_HEAD + b'1,A,"hello\n2,B,b"\n3,C,c\n',
        2,
        "look like rows",
    ),
    "two columns, numbered rows": ("a.csv", b'id,text\n0,a\n1,"hello\n2,b"\n3,c\n', 3, "look like rows"),
    "two columns, the number last": ("a.csv", b'text,id\n"hello,1\nb",2\nc,3\n', 2, "look like rows"),
    "in a column between": ("a.csv", ROWS_HEAD + b'1,"Safe,hello\n2,Unsafe",x\n3,Safe,x\n', 2, "look like rows"),
    "in the names of the columns": ("a.csv", b'id,label,"text\n1,Safe,hello\n2,Safe,b"\n', 1, "name continues on"),
    "the opening line is another's": ("a.csv", HEAD.encode() + b'"a\nb",Safe\n\n\n"c,Safe\n', 6, "not closed"),
    "too many cells": ("a.csv", HEAD.encode() + b"a,Safe\nYes, it is,Safe\n", 3, "3 cells, the header has 2"),
    "too few cells": ("a.csv", HEAD.encode() + b"\n\na\n", 4, "1 cells, the header has 2"),
    "one more in every row": ("a.csv", b"text,label\n0,a,Safe\n1,b,Safe\n", 2, "3 cells"),
    "a column twice": ("a.csv", b"text,label,text\na,Safe,b\n", 1, "'text' occurs twice"),
    "a column twice, with a blank": ("a.csv", b"text,label,label \na,Safe,Safe\n", 1, "'label' occurs twice"),
    "semicolons": ("a.csv", b"text;label\na;Safe\n", 1, "separated by a semicolon"),
    "tabs in a CSV": ("a.csv", b"text\tlabel\na\tSafe\n", 1, "separated by a tab"),
    "commas in a TSV": ("a.tsv", b"text,label\na,Safe\n", 1, "separated by a comma"),
    "a spreadsheet's sep line": ("a.csv", b"sep=;\ntext;label\na;Safe\n", 1, "semicolon"),
    "empty": ("a.csv", b"", None, "is empty"),
    "a mark alone": ("a.csv", codecs.BOM_UTF8, None, "is empty"),
    "no names": ("a.csv", b",,\na,b,c\n", 1, "names of the columns"),
    "an Excel workbook": ("a.csv", b"PK\x03\x04" + bytes(60), None, "Excel workbook: save it as CSV"),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08" + bytes(20), None, "gunzip"),
    "Parquet": ("a.jsonl", b"PAR1" + bytes(20), None, "Parquet"),
    "another ending": ("a.xlsx", b"x", None, r"none of \.tsv, \.csv, \.jsonl"),
    "JSON: cut": ("a.jsonl", b'{"a": 1}\n\n\n{"a": \n', 4, "not JSON"),
    "JSON: over several lines": ("a.jsonl", b'{\n  "a": 1\n}\n', 1, "jq -c '.'"),
    "JSON: a list": ("a.jsonl", b'[{"a": 1},\n {"a": 2}]\n', 1, r"jq -c '\.\[\]'"),
    "JSON: a number in a whole record": ("a.jsonl", b'{"a": 1}\n{"a": 1e999}\n', 2, "not a finite number.*; correct"),
    "JSON: a list in a line": ("a.jsonl", b'[{"a": 1}]\n', 1, r"jq -c '\.\[\]'"),
    "JSON: no object": ("a.jsonl", b'{"a": 1}\n3\n', 2, "not a JSON object"),
    "JSON: a key twice": ("a.jsonl", b'{"a": 1}\n{"b": {"a": 1, "a": 2}}\n', 2, "key 'a' occurs twice"),
    "JSON: NaN": ("a.jsonl", b'{"a": NaN}\n', 1, "NaN is not a finite number"),
    "JSON: -Infinity": ("a.jsonl", b'{"a": -Infinity}\n', 1, "-Infinity is not a finite number"),
    "JSON: 1e999": ("a.jsonl", b'{"a": 1e999}\n', 1, "1e999 is not a finite number"),
    "JSON: 6,000 digits": ("a.jsonl", b'{"a": ' + b"9" * 6000 + b"}\n", 1, "4300"),
    "JSON: nested deeply": ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", 1, "nested too deeply"),
    "JSON: a control character": ("a.jsonl", b'{"a": "b\x07c"}\n', 1, "not JSON"),
    "JSON: bad UTF-8": ("a.jsonl", b'{"a": 1}\r\n{"a": "\xff"}\r\n', 2, "byte 0xff"),
    "JSON: half a surrogate as bytes": ("a.jsonl", b'{"a": "\xed\xa0\xbd"}\n', 1, "not UTF-8"),
    "JSON: a zero byte": ("a.jsonl", b'{"a": 1}\n{"a": "\0"}\n', 2, "NUL"),
    "JSON: UTF-16 without a mark": ("a.jsonl", '{"a": 1}\n'.encode("utf-16-le"), 1, "UTF-16LE"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_damaged_table_is_rejected_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, line, message = REJECTED[case]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(RecordError, match=message) as caught:
        read_rows(file)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 600
    assert str(file) in said
    assert line is None or f"{file}, line {line}: " in said


def test_row_line_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,label\n\n"a\nb",Safe\n\nc,Safe\n')
    (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\n\n\n{"a": 2}\n')
    assert [line for line, _ in read_rows(tmp_path / "a.csv")] == [3, 6]
    assert [line for line, _ in read_rows(tmp_path / "a.jsonl")] == [2, 5]


def test_tables_written_by_pandas_are_read_unchanged(tmp_path: Path) -> None:
    """Rows written by pandas, with all characters that need quoting."""
    texts = ['a "quote"', "a,b\tc", "two\nlines", "", " blank ", "«»", "x" * 200_000, json.dumps({"a": ['"']})]
    frame = pd.DataFrame({"text": texts, "label": ["Safe"] * len(texts)})
    for name, delimiter in ("a.csv", ","), ("a.tsv", "\t"):
        frame.to_csv(tmp_path / name, sep=delimiter, index=False)
        assert [row["text"] for _, row in read_rows(tmp_path / name)] == texts
