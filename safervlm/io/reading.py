"""Reading of text, JSON and YAML files and writing of JSON, by the same rules for all files.

Text is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one. Lines end in LF, CR LF or CR, and no
other character ends a line. JSON is strict: NaN, Infinity and duplicate keys are rejected. YAML with duplicate keys is
rejected too. A file that can't be read is rejected in one line that names the file, the line in it, and how to correct
it.
"""

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safervlm.errors import RecordError

# Byte order mark -> encoding. The mark of UTF-32 begins with that of UTF-16, and must come first.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# First bytes of files of other formats -> their description and the remedy.
OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive or an Excel workbook: save it as CSV (UTF-8) or JSONL",
    b"\x1f\x8b": "compressed by gzip: unpack it by `gunzip`",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it by `unzstd`",
    b"PAR1": "Parquet: save it as JSONL",
    b"BZh91AY&SY": "compressed by bzip2: unpack it by `bunzip2`",
    b"\xfd7zXZ\0": "compressed by xz: unpack it by `unxz`",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save it as CSV (UTF-8) or JSONL",
    b"SQLite format 3\0": "a SQLite database: export the table as CSV or JSONL",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file by `git lfs pull`",
}


def text_encoding(start: bytes) -> str:
    """Returns the name of the encoding that a file's byte order mark states; UTF-8 if it has none.

    Args:
        start: First four bytes of the file, or all of a shorter one.
    """
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")


def text_lines(path: Path) -> Iterator[str]:
    """Iterates over the lines of a text file, unchanged, including their ends.

    Args:
        path: Text file.

    Raises:
        RecordError: The file can't be opened, or is not a text; the message names file and line.
    """
    try:
        with path.open("rb") as file:
            start = file.read(max(map(len, OTHER_KINDS)))
        for mark, kind in OTHER_KINDS.items():
            if start.startswith(mark):
                raise RecordError(f"{path}: not a text file, but {kind}")
        start = start[:4]
        encoding = text_encoding(start)
        # newline="": CR and CR LF end a line, as LF does, and are not translated (a quoted cell may contain them).
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
    """Returns why a file is not in its expected encoding, and how to convert it."""
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
    """Parses a JSON text.

    Args:
        text: JSON text.
        where: File and line, for the error message.
        way_out: Remedy for a text that is not valid JSON.
        finite: Whether to reject NaN and Infinity; settings may be infinite.

    Returns:
        The value.

    Raises:
        RecordError: The text is not valid JSON, has a duplicate key, contains NaN or Infinity (including ``1e999``) or
            an integer of over 4,300 digits, or is nested too deeply.
    """
    number = _finite if finite else float
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=number, parse_float=number)
    except json.JSONDecodeError as error:
        raise RecordError(f"{where}: not JSON ({error.msg}): {text[:80]!r}; {way_out}") from None
    except RecursionError:
        raise RecordError(f"{where}: JSON nested too deeply: {text[:40]!r}; {way_out}") from None
    except ValueError as error:  # raised by the hooks, and by Python for an integer that is too long
        reason = str(error).split(";")[0]  # without Python's advice to raise its limit
        raise RecordError(f"{where}: JSON that is not accepted ({reason}): {text[:80]!r}; {way_out}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return record


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not a finite number")
    return value


def _text(path: Path, way_out: str) -> str:
    """Returns the text of a file; ``way_out``, if any, is added to the error message."""
    try:
        return "".join(text_lines(path))
    except RecordError as error:
        raise RecordError(f"{error}; or {way_out}" if way_out else str(error)) from None


def read_json(path: Path, way_out: str = "", finite: bool = True) -> Any:
    """Reads a JSON file.

    Args:
        path: File to read.
        way_out: Remedy for a file that can't be read or is not valid JSON.
        finite: Whether to reject NaN and Infinity; see :func:`parse_json`.

    Returns:
        The value.

    Raises:
        RecordError: The file can't be read or is not valid JSON; the message names the file.
    """
    text = _text(path, way_out)
    way_out = way_out or "correct the file"
    if not text.strip():
        raise RecordError(f"{path}: is empty, and needs JSON; {way_out}")
    try:
        json.loads(text)  # only for the number of the line, which the error of the strict parser does not contain
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}); {way_out}"
        ) from None
    except (RecursionError, ValueError):
        pass
    return parse_json(text, str(path), way_out, finite)


def read_object(path: Path, way_out: str = "", finite: bool = True) -> dict[str, Any]:
    """Reads a JSON file that contains an object; see :func:`read_json`.

    Args:
        path: File to read.
        way_out: Remedy for a file that can't be read or is not a JSON object.
        finite: Whether to reject NaN and Infinity.

    Returns:
        The object.

    Raises:
        RecordError: The file can't be read, or is not a JSON object; the message names the file.
    """
    value = read_json(path, way_out, finite)
    if not isinstance(value, dict):
        raise RecordError(f"{path}: not a JSON object: {str(value)[:80]!r}; {way_out or 'correct the file'}")
    return value


def numbered_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Iterates over the records of a JSONL file with their line numbers, from 1; blank lines are skipped.

    Args:
        path: JSONL file.

    Raises:
        RecordError: The file can't be read, or a line is not a JSON object; the message names file and line.
    """
    path = Path(path)
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        begun, ended = line.strip()[0], line.strip()[-1]
        way_out = "correct the line"
        if begun == "[" or (begun == "{" and ended != "}"):  # a list of records, or a record over several lines
            filter_ = ".[]" if begun == "[" else "."
            way_out = f"each line must be one JSON object: convert it by `jq -c '{filter_}' {path} > NEW`"
        record = parse_json(line, where, way_out)
        if not isinstance(record, dict):
            raise RecordError(f"{where}: not a JSON object: {line[:80]!r}; {way_out}")
        yield number, record


def json_text(value: Any, indent: int | None = None, name: str = "", finite: bool = True) -> str:
    r"""Returns the JSON of a value; lone surrogates are kept, as escapes such as ``\ud83d``.

    A high surrogate directly followed by a low one is read back as the character that the two encode, as JSON demands.

    Args:
        value: Value of plain JSON types.
        indent: Spaces per level; None writes one line.
        name: Name of the record, for the error message.
        finite: Whether NaN and infinities are rejected; a setting may be infinite.

    Raises:
        RecordError: A number is NaN or infinite.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=not finite)
    except ValueError as error:
        raise RecordError(f"{name or 'a record'}: can't be written as JSON ({error})") from None
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)
