"""Seals: provenance and checksum of a checkpoint or an exported adapter; both are verified on loading.

A checkpoint that is a single file has its seal after its content, as the comment of the zip archive that ``torch.save``
writes: the two can't be separated, and the file is replaced in one move. A folder (a sharded checkpoint, an adapter)
has a file ``safervlm.json``.
"""

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safervlm.errors import RecordError, first_line
from safervlm.io.checkpoints import REMEDY, require_valid_checkpoint
from safervlm.io.reading import parse_json
from safervlm.io.settings import flat
from safervlm.legacy import with_todays_names
from safervlm.provenance import PACKAGES, installed_version

SEAL = "safervlm.json"
END = struct.Struct("<4s4H2LH")  # last record of a zip archive; its last field is the length of the comment
DIGITS = 64  # hexadecimal digits of SHA-256, at the end of the comment
# Files of a sharded checkpoint that have no seal: FSDP's and Lightning's description, DeepSpeed's files.
SHARDED = (".metadata", "meta.pt", "latest", "checkpoint", "zero_to_fp32.py")


def seal(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a seal: the settings and the versions of packages.

    Args:
        origin: Settings; values must be serialisable as JSON.
    """
    return {"origin": json.loads(json.dumps(origin)), "versions": {name: installed_version(name) for name in PACKAGES}}


def file_digest(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal digits.

    Args:
        path: File.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_file(path: Path, origin: Mapping[str, Any]) -> None:
    """Appends the seal to a checkpoint written by ``torch.save``.

    Args:
        path: Checkpoint file.
        origin: Settings that it was made with, as plain JSON values.

    Raises:
        ValueError: The settings do not fit into the comment of a zip archive (65,535 bytes).
    """
    text = json.dumps(seal(origin), separators=(",", ":")).encode()
    length = len(text) + DIGITS
    if length > 0xFFFF:
        raise ValueError(f"the settings take {length} bytes, a seal has room for {0xFFFF}")
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", length) + text)
        file.flush()
        digest = file_digest(path)  # of the content and the seal, up to here
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def seal_folder(folder: Path, origin: Mapping[str, Any]) -> None:
    """Writes the seal of a folder, with the checksum of each file in it.

    Args:
        folder: Folder; all its files must be complete.
        origin: Settings that it was made with, as plain JSON values.
    """
    files = {file.relative_to(folder).as_posix(): file_digest(file) for file in files_of(folder)}
    text = json.dumps(seal(origin) | {"files": files}, indent=2)
    digest = hashlib.sha256(text.encode()).hexdigest()
    with (folder / SEAL).open("w", encoding="utf-8", newline="\n") as file:
        file.write(f"{text}\n{digest}\n")
        file.flush()
        os.fsync(file.fileno())


def files_of(folder: Path) -> list[Path]:
    """Returns the files of a sealed folder, sorted, without the seal.

    Args:
        folder: Folder; subfolders are included.
    """
    return sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / SEAL)


def parse_seal(text: str, path: Path) -> dict[str, Any]:
    """Parses the content of a seal.

    Args:
        text: JSON text.
        path: File that the text is from, for the error message.

    Returns:
        The content. ``origin`` is a dictionary; ``files``, if it exists, has a text for each file.

    Raises:
        RecordError: The text is not JSON, or not of this form.
    """
    found = parse_json(text, str(path), REMEDY, finite=False)
    files = found.get("files", {}) if isinstance(found, dict) else None
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise RecordError(f"{path}: its list of checksums is damaged (no files: {text!r:.80}); {REMEDY}")
    if not isinstance(found.get("origin"), dict):
        raise RecordError(
            f"{path}: its list of checksums is damaged (no settings under origin: {text!r:.80}); {REMEDY}"
        )
    return found


def verify_file(path: Path, argument: str) -> dict[str, Any] | None:
    """Verifies the checksum of a checkpoint file and returns the content of its seal.

    Args:
        path: Checkpoint file.
        argument: Argument that names it, for the error message.

    Returns:
        None for a checkpoint without a seal (of version 0.1), for which the archive's own checksums are verified.

    Raises:
        RecordError: The file is empty, damaged, or not a checkpoint.
    """
    damaged = f"{argument}: {str(path)!r} is damaged"
    try:
        if not path.is_file():
            raise RecordError(f"{argument}: {str(path)!r} is not a regular file; name the last.ckpt of a run")
        if not path.stat().st_size:
            raise RecordError(f"{argument}: {str(path)!r} is empty; {REMEDY}")
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment
            if not comment and (torn := archive.testzip()) is not None:
                raise RecordError(f"{damaged} (in its part {torn}); {REMEDY}")
        if not comment:
            require_valid_checkpoint(path, argument)
            return None
        digest = hashlib.sha256()
        with path.open("rb") as file:
            left = path.stat().st_size - DIGITS
            while left > 0 and (block := file.read(min(left, 1 << 24))):
                digest.update(block)
                left -= len(block)
            said = file.read()
        if digest.hexdigest().encode() != said:
            raise RecordError(f"{damaged} (its checksum is another one); {REMEDY}")
        found = parse_seal(comment[:-DIGITS].decode(), path)
        require_valid_checkpoint(path, argument)
    except RecordError:
        raise
    except Exception as error:  # zipfile and pickle raise many kinds of exceptions
        raise RecordError(
            f"{argument}: {str(path)!r} is damaged, or not a checkpoint ({first_line(error)}); {REMEDY}"
        ) from error
    return found


def verify_folder(folder: Path, argument: str) -> dict[str, Any] | None:
    """Verifies the checksums of a folder's files and returns the content of its seal.

    Args:
        folder: Sharded checkpoint, or adapter.
        argument: Argument that names it, for the error message.

    Returns:
        None for a folder without a seal, made by another program or version 0.1.

    Raises:
        RecordError: A file is damaged or missing.
    """
    if not (folder / SEAL).is_file():
        return None
    damaged = f"{argument}: {str(folder)!r} is damaged"
    try:
        text, digest, _ = (folder / SEAL).read_bytes().rsplit(b"\n", 2)
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise RecordError(f"{damaged} ({SEAL} has another checksum); {REMEDY}")
        found = parse_seal(text.decode(), folder / SEAL)
        for name, expected in found["files"].items():
            if not (folder / name).is_file():
                raise RecordError(f"{damaged} ({name} is missing); {REMEDY}")
            if file_digest(folder / name) != expected:
                raise RecordError(f"{damaged} ({name} has another checksum); {REMEDY}")
    except RecordError:
        raise
    except Exception as error:
        raise RecordError(f"{damaged} ({SEAL}: {first_line(error)}); {REMEDY}") from error
    return found


def verify_seal(
    path: Path, origin: Mapping[str, Any] | None, argument: str = "--ckpt_path", ignore: Iterable[str] = ()
) -> None:
    """Rejects a checkpoint that is damaged, or was made with other settings.

    Args:
        path: Checkpoint file, or folder of a sharded checkpoint.
        origin: Current settings, as plain JSON values; None to verify only the checksums.
        argument: Argument that names the checkpoint, for the error message.
        ignore: Dotted names of settings that may differ, including the settings nested in them.

    Raises:
        RecordError: The checkpoint is damaged, or settings differ; the message names at most five.
    """
    if path.is_dir():
        if not any(path.iterdir()):
            raise RecordError(f"{argument}: the folder {str(path)!r} is empty; {REMEDY}")
        found = verify_folder(path, argument)
        if not any((path / name).exists() for name in SHARDED):
            raise RecordError(f"{argument}: the folder {str(path)!r} is not a checkpoint; name the last.ckpt in it")
    else:
        found = verify_file(path, argument)
    if found is None or origin is None:
        return
    differing = differences(found["origin"], origin, ignore)
    if differing:
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        raise RecordError(
            f"{argument}: {str(path)!r} was made with other settings: {'; '.join(differing[:5])}{more}; use the "
            "settings that it was made with"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """Returns the settings that differ, each as ``NAME: VALUE there, VALUE now``.

    A model is identified by the fingerprint of its weights: its name and revision are compared only if a fingerprint is
    unknown. If the classes differ, only the classes are reported.

    Args:
        before: Settings of the checkpoint.
        now: Settings of the run.
        ignore: Dotted names of settings that may differ, including the settings nested in them.
    """
    there, here = (with_todays_names(dict(flat(each))) for each in (before, json.loads(json.dumps(now))))
    passed = set(ignore)
    for key in there:
        if key.endswith(".weights") and there[key] is not None and here.get(key) is not None:
            passed |= {f"{key.removesuffix('weights')}{part}" for part in ("model", "revision")}
    if there.get("class") != here.get("class"):
        passed |= {key for key in {**there, **here} if key != "class"}  # other differences follow from it
    return [
        f"model.{key}: {there.get(key)!r} there, {here.get(key)!r} now"
        for key in {**there, **here}
        if there.get(key) != here.get(key) and not any(key == name or key.startswith(f"{name}.") for name in passed)
    ]


def origin_of(module: Any) -> dict[str, Any]:
    """Returns the class of a Lightning module and the settings that its ``describe``, if any, returns.

    Args:
        module: Lightning module.
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    describe = getattr(module, "describe", None)
    return {"class": kind} | (describe() if describe is not None else {})
