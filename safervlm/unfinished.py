"""Results of a long computation, stored chunk by chunk until the computation is complete."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from safervlm.errors import RecordError, first_line
from safervlm.records import Failure, Response, Verdict, read_torn_jsonl, to_line, write_jsonl

Made = TypeVar("Made", bound=Response | Verdict)


class UnfinishedFile(Generic[Made]):
    """A file of the run folder with the chunks of a computation that are complete, one per line.

    Each line is flushed, so a process that dies loses at most the current chunk. The next start reads the chunks if the
    key, which is in the first line, is the same; otherwise it starts over. As chunks are read completely or not at
    all, a resumed computation has the same chunks as an uninterrupted one, and the same rounding. The caller removes
    the file after it has written the results.

    Args:
        path: The file.
        key: Hash of everything that determines the chunks.
        kind: Class of the records; a chunk may also contain failures.

    Attributes:
        chunks: The complete chunks, in order.

    Raises:
        RecordError: The file is damaged.
    """

    def __init__(self, path: Path, key: str, kind: type[Made]) -> None:
        self.path = path
        self.chunks: list[list[Made | Failure]] = []
        lines = self._read(key)
        try:
            for line in lines:
                self.chunks.append([_record(each, kind) for each in line["records"]])
        except (KeyError, TypeError, ValueError) as error:  # including RecordError
            raise self._damaged(f"{type(error).__name__}: {first_line(error)}") from None
        write_jsonl(path, [{"key": key}, *lines])  # removes an incomplete last line
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def _read(self, key: str) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        try:
            lines = read_torn_jsonl(self.path)
        except RecordError as error:
            raise self._damaged(str(error)) from None
        return lines[1:] if lines and lines[0].get("key") == key else []

    def _damaged(self, reason: str) -> RecordError:
        return RecordError(f"{self.path}: damaged ({reason}); delete it, and the same command starts over")

    def append(self, records: Sequence[Made | Failure]) -> None:
        """Appends a complete chunk.

        Args:
            records: Records of the chunk.
        """
        self._file.write(to_line({"records": [record.to_dict() for record in records]}))
        self._file.flush()
        self.chunks.append(list(records))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes the file."""
        self._file.close()


def _record(fields: Mapping[str, Any], kind: type[Made]) -> Made | Failure:
    return Failure.from_dict(fields) if "reason" in fields else kind.from_dict(fields)  # type: ignore[return-value]
