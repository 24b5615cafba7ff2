"""Machine-independent hashes: fingerprints of contents, and seeds derived from names."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Error handler of str.encode that also encodes lone surrogates.
HALVES = "surrogatepass"


def fingerprint(*parts: str | bytes | Path) -> str:
    """Computes a short hash of texts, bytes and files, in order.

    Args:
        *parts: Texts, bytes, or paths; of a path, the content of its file is used.

    Returns:
        The first 16 hexadecimal digits of a SHA-256 over the SHA-256 digests of the parts.
    """
    return _joined(map(_digest, parts))


def fingerprint_of_files(files: Iterable[Path]) -> str:
    """Computes the :func:`fingerprint` of large files in parallel threads, at most one per core.

    Args:
        files: Files, in order.

    Returns:
        The first 16 hexadecimal digits of the hash.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases Python's lock
        return _joined(pool.map(_digest, files))


def _digest(part: str | bytes | Path) -> bytes:
    if isinstance(part, Path):
        with part.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    return hashlib.sha256(part.encode(errors=HALVES) if isinstance(part, str) else part).digest()


def _joined(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def seed_for(*names: str | int) -> int:
    """Derives a 63-bit seed from names, for example ``seed_for(seed, record.id)``; the same on every machine.

    Args:
        *names: Texts and integers; their order matters.

    Returns:
        An integer from 0 to 2^63 - 1.
    """
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode(errors=HALVES)).digest()
    return int.from_bytes(digest[:8], "little") >> 1
