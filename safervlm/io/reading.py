"""How files of text, JSON and YAML are read and JSON is written: one set of rules for all files.

Text is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one; lines end in LF, CR LF or CR, and no
other character ends a line. JSON is strict: no NaN or Infinity, no key twice in an object; nor has YAML a key twice. A
file that can't be read is rejected in one line that names the file, the line in it, and how to correct it.
"""

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safervlm.errors import RecordError

# Byte order marks and what they announce. The mark of UTF-32 begins with that of UTF-16, and so comes first.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What files of other kinds begin with, and what to do about them.
OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive or an Excel workbook: save it as CSV (UTF-8) or JSONL",
    b"\x1f\x8b": "compressed by gzip: unpack it by `gunzip`",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it by `unzstd`",
    b"PAR1": "Parquet: save it as JSONL",
}


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, unchanged, their ends included.

    Raises:
        RecordError: the file can't be opened, or isn't text; the message names file and line.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        for mark, kind in OTHER_KINDS.items():
            if start.startswith(mark):
                raise RecordError(f"{path}: not a text file, but {kind}")
        encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
        # newline="": CR and CR LF end a line as LF does, and stay as they are (a quoted cell may contain them).
        with path.open(encoding=encoding, newline="") as lines:
            for number, line in enumerate(lines, 1):
                if "\0" in line:
                    raise RecordError(f"{path}, line {number}: {_about_zeros(start, path)}")
                yield line
    except UnicodeDecodeError:
        raise RecordError(_undecodable(path, encoding)) from None
    except OSError as error:
        raise RecordError(f"{path}: can't be read ({error.strerror}): correct its path or permissions") from None


def _about_zeros(start: bytes, path: Path) -> str:
    for name, zeros in ("UTF-16LE", (1, 3)), ("UTF-16BE", (0, 2)):
        if len(start) == 4 and [place for place in range(4) if not start[place]] == list(zeros):
            return f"{name} without a byte order mark: convert it by `iconv -f {name} -t UTF-8 {path} > NEW`"
    return f"contains a NUL (zero) byte: remove it, for example by `tr -d '\\0' < {path} > NEW`"


def _undecodable(path: Path, encoding: str) -> str:
    """Why a file is not in the encoding that it should have, and how to convert it."""
    content = path.read_bytes()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        before = content[: error.start]
        if encoding.startswith("utf-8"):
            if (zeros := _about_zeros(content[:4], path)).startswith("UTF-16"):
                return f"{path}, line 1: {zeros}"
            line = before.count(b"\n") + before.replace(b"\r\n", b"").count(b"\r") + 1
            return (
                f"{path}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x}): convert it, from Windows's "
                f"encoding by `iconv -f WINDOWS-1252 -t UTF-8 {path} > NEW`"
            )
        line = len(re.findall("\r\n|\r|\n", before.decode(encoding, errors="replace"))) + 1
        return f"{path}, line {line}: not the {encoding.upper()} that it begins as ({error.reason}): save it as UTF-8"
    return f"{path}: changed while it was read: run the command again"


def parse_json(text: str, where: str, way_out: str = "correct it", finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: the JSON.
        where: file and line, for the error.
        way_out: what to do about text that is no JSON.
        finite: whether NaN and Infinity are rejected; a setting may be infinite.

    Raises:
        RecordError: it is no JSON, has a key twice, contains NaN or Infinity (``1e999`` included) or an integer of over
            4,300 digits, or is nested too deeply.
    """
    number = _finite if finite else float
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=number, parse_float=number)
    except json.JSONDecodeError as error:
        raise RecordError(f"{where}: not JSON ({error.msg}): {text[:80]!r}; {way_out}") from None
    except RecursionError:
        raise RecordError(f"{where}: JSON nested too deeply: {text[:40]!r}; {way_out}") from None
    except ValueError as error:  # from the hooks, and of an integer that is too long
        reason = str(error).split(";")[0]  # Python's own advice is to raise its limit
        raise RecordError(f"{where}: JSON that is not accepted ({reason}): {text[:80]!r}; {way_out}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return record


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not a finite number")
    return value


def _text(path: Path, way_out: str) -> str:
    """The text of a file; an error also says what else to do, if anything."""
    try:
        return "".join(text_lines(path))
    except RecordError as error:
        raise RecordError(f"{error}; or {way_out}" if way_out else str(error)) from None


def read_json(path: Path, way_out: str = "", finite: bool = True) -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        way_out: what to do about a file that can't be read or is no JSON.
        finite: see :func:`parse_json`.

    Raises:
        RecordError: it can't be read or is no JSON; the message names the file.
    """
    text = _text(path, way_out)
    way_out = way_out or "correct the file"
    if not text.strip():
        raise RecordError(f"{path}: is empty, and needs JSON; {way_out}")
    try:
        json.loads(text)  # alone for the line, which the message of a strict reading doesn't have
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}); {way_out}"
        ) from None
    except (RecursionError, ValueError):
        pass
    return parse_json(text, str(path), way_out, finite)


def read_object(path: Path, way_out: str = "", finite: bool = True) -> dict[str, Any]:
    """The object in a JSON file; see :func:`read_json`.

    Raises:
        RecordError: it can't be read, or is no JSON object; the message names the file.
    """
    value = read_json(path, way_out, finite)
    if not isinstance(value, dict):
        raise RecordError(f"{path}: not a JSON object: {str(value)[:80]!r}; {way_out or 'correct the file'}")
    return value


def numbered_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a JSONL file, each with the number of its line in the file, from 1. Blank lines are skipped.

    Raises:
        RecordError: a line that is not a JSON object, naming file and line.
    """
    path = Path(path)
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        begun = line.strip()[0]
        # A JSON document over several lines begins like this, and so does a list of records.
        way_out = "correct the line"
        if begun in "[{":
            filter_ = ".[]" if begun == "[" else "."
            way_out = f"each line must be a JSON object of its own: `jq -c '{filter_}' {path} > NEW` makes it so"
        record = parse_json(line, where, way_out)
        if not isinstance(record, dict):
            raise RecordError(f"{where}: not a JSON object: {line[:80]!r}; {way_out}")
        yield number, record


def json_text(value: Any, indent: int | None = None, name: str = "") -> str:
    r"""The JSON of a value: every text survives it, and half a surrogate pair too (as ``\ud83d``).

    A high half directly followed by a low one is read back as the character that the two encode, as JSON demands.

    Args:
        value: of plain JSON types.
        indent: spaces a level; None writes one line.
        name: of the record, for the error.

    Raises:
        RecordError: a number that is NaN or infinite.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RecordError(f"{name or 'a record'}: can't be written as JSON ({error})") from None
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)
