"""Downloads of evaluation datasets from the web or the Hub, kept as local files."""

import base64
import hashlib
import math
import re
import ssl
import time
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError

from safervlm.addresses import public, public_text
from safervlm.data.tables import TABLES
from safervlm.errors import ArgumentError, RecordError, first_line
from safervlm.io.caches import cache_folder
from safervlm.io.files import write_atomically
from safervlm.io.progress import progress
from safervlm.records import to_line

if TYPE_CHECKING:
    from datasets import Dataset

MB = 1e6  # bytes


def on_the_hub(source: str) -> bool:
    """Returns whether a source is the name of a dataset on the Hub.

    It is if it has the form ``owner/name`` or ``owner/name@revision``, neither the path nor its parent folder exists
    locally, and it does not have the file ending of a table.

    Args:
        source: Value of ``data.source``.
    """
    path = Path(source).expanduser()
    here = path.exists() or path.parent.is_dir() or path.suffix.lower() in TABLES
    return not here and re.fullmatch(r"[\w-]+/[\w.-]+(@[\w./-]+)?", source) is not None


@dataclass(frozen=True)
class Download:
    """Limits of a file's download. Redirects are not followed: only the given address is requested.

    Attributes:
        max_bytes: Maximum size of the file, in bytes.
        timeout: Maximum time for the whole file, in seconds.
        pause: Maximum time without receiving a byte, in seconds.

    Raises:
        ArgumentError: A limit is not a finite number above 0.
    """

    max_bytes: int = 8 * 1024**3
    timeout: float = 3600.0
    pause: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ArgumentError(f"data.download.{name}: a number above 0, got {value}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Raises URLError, because the new address was not named by the user."""
        raise URLError(
            f"it redirects to {public(newurl)[:200]!r}, which is not followed; name that address if you trust it"
        )


def fetch(address: str, file: Path, bounds: Download = Download()) -> None:
    """Downloads a file from the web. It is written completely or not at all.

    Args:
        address: Address of the file.
        file: Local path to write.
        bounds: Limits of the download.

    Raises:
        RecordError: The file is unavailable or exceeds a limit.
        ArgumentError: The folder of the file can't be created or written to.
    """
    opener = urllib.request.build_opener(_NoRedirects)
    too_large = f"it has more than {bounds.max_bytes} bytes, see data.download.max_bytes"

    def write(path: Path) -> None:
        end = time.monotonic() + bounds.timeout
        with opener.open(address, timeout=bounds.pause) as response, path.open("wb") as out:
            size = response.length  # of the body, if the server reports it; a truncated body is shorter
            if size is not None and size > bounds.max_bytes:
                raise URLError(too_large)
            with progress(f"fetching {file.name}", size and size / MB, "MB") as update:
                # read1 returns after one packet, so the time limit is checked even if packets arrive slowly.
                while block := response.read1(1 << 16):
                    out.write(block)
                    update(out.tell() / MB)
                    if out.tell() > bounds.max_bytes:
                        raise URLError(too_large)
                    if time.monotonic() > end:
                        raise URLError(f"it takes longer than {bounds.timeout:g} s, see data.download.timeout")
            if size is not None and out.tell() != size:
                raise URLError(f"{out.tell()} of {size} bytes were received")

    cache_folder(file.parent)
    try:
        write_atomically(file, write)
    # Not every OSError: disk errors have another remedy.
    except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        reason = public_text(first_line(error).strip("<>").removeprefix("urlopen error "))
        if isinstance(error, HTTPError):  # the server's message may contain the query
            reason = f"HTTP status {error.code}"
        raise RecordError(
            f"{public(address)} can't be fetched ({reason}): fetch it by other means to {file}, or name the file as "
            "data.source"
        ) from None


def check_download(file: Path, md5: str | None, address: str) -> None:
    """Verifies the checksum of a downloaded file.

    Args:
        file: Downloaded file, or a copy obtained by other means.
        md5: Published MD5 checksum. None skips the check.
        address: Address of the file, for the error message.

    Raises:
        RecordError: The checksum differs.
    """
    with file.open("rb") as content:
        found = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 is not None and found != md5:
        raise RecordError(
            f"{file}: its MD5 is {found}, that of {address} is {md5}: another file; remove it and try again"
        )


def save_table(rows: "Dataset", file: Path) -> None:
    """Writes the rows of a dataset of the Hub as JSONL, with its images as base64.

    Args:
        rows: Rows of the dataset.
        file: JSONL file to write.

    Raises:
        ArgumentError: The folder of the file can't be created or written to.
    """
    cache_folder(file.parent)

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="\n") as lines:
            for row in rows:
                lines.write(to_line({column: _plain(value) for column, value in row.items()}))

    write_atomically(file, write)


def _plain(value: Any) -> Any:
    """Converts a value of the Hub to JSON: images and bytes to base64, non-finite numbers to null, dates to text."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        value = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
