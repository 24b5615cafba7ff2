"""Hashes that are the same on every machine: fingerprints of contents, seeds by name."""

import hashlib
from pathlib import Path

# Half a surrogate pair is hashed as what it is.
HALVES = "surrogatepass"


def fingerprint(*parts: str | bytes | Path) -> str:
    """A short hash of texts, bytes and files (by content), in order: 16 hexadecimal digits of SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        else:
            content = hashlib.sha256(part.encode(errors=HALVES) if isinstance(part, str) else part).digest()
        digest.update(content)
    return digest.hexdigest()[:16]


def seed_for(*names: str | int) -> int:
    """A 63-bit seed drawn from names, for example ``seed_for(seed, record.id)``: the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode(errors=HALVES)).digest()
    return int.from_bytes(digest[:8], "little") >> 1
