"""Local copies of datasets from the Hub, each stored under the commit from which it was made.

A branch such as ``main`` has a new commit after each change on the Hub. The process that prepares the data queries the
Hub for the commit, and writes it to a small file next to the copies, where the other processes of the run read it.
If the Hub does not answer, the copy of the commit in that file is used, and a message says so.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

from safervlm.data.hub import hub_rows
from safervlm.hashing import fingerprint
from safervlm.io.files import write_text_atomically
from safervlm.io.tables import say

if TYPE_CHECKING:
    from datasets import Dataset

COMMIT = re.compile(r"[0-9a-f]{40}")


def copy_of(repo: str, cache: Path, suffix: str = "") -> Path:
    """Returns the path of the copy that was prepared last, which exists after :func:`update_copy`.

    Args:
        repo: Hub repository, ``owner/name`` or ``owner/name@revision``; or the folder of a dataset in the Hub's format.
        cache: Folder of the copies.
        suffix: Ending of the copy's name.
    """
    return _named(repo, cache, _fixed(repo) or _last_commit(repo, cache), suffix)


def update_copy(repo: str, cache: Path, local: str, save: Callable[["Dataset", Path], None], suffix: str) -> None:
    """Makes a copy of the commit to which a repository's revision now refers, unless the copy exists.

    Args:
        repo: Hub repository, or folder (see :func:`copy_of`).
        cache: Folder of the copies.
        local: How to specify a local dataset instead, for the error message.
        save: Function that writes rows to a path, completely or not at all.
        suffix: Ending of the copy's name.

    Raises:
        RecordError: No copy exists, and the dataset is unavailable or can't be read.
        OSError: The copy can't be written.
    """
    name, _, revision = repo.partition("@")
    commit = _fixed(repo) or _commit_now(repo)
    rows = None
    if commit is None:
        if (there := copy_of(repo, cache, suffix)).exists():
            say(f"{repo}: the Hub does not report its commit now, so the copy {there} is used")
            return
        rows = hub_rows(repo, local)  # raises the error with the reason, or reads the library's own cache
        commit = _commit_of(rows)
    path = _named(repo, cache, commit, suffix)
    if not path.exists():
        if rows is None:
            rows = hub_rows(repo if Path(repo).exists() else f"{name}@{commit}", local)
        save(rows, path)
    if commit not in (revision, _last_commit(repo, cache)):
        write_text_atomically(_last(repo, cache), f"{commit}\n")


def _named(repo: str, cache: Path, commit: str | None, suffix: str) -> Path:
    """Returns the path of the copy of a commit; for None, a path at which no copy is ever made."""
    readable = _readable(repo)
    return cache / f"{readable if commit is None else f'{readable}-{commit}'}{suffix}"


def _last(repo: str, cache: Path) -> Path:
    """Returns the path of the file with the commit that a revision named last."""
    return cache / f"{_readable(repo)}.commit"


def _last_commit(repo: str, cache: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        commit = _last(repo, cache).read_text(encoding="ascii").strip()
        return commit if re.fullmatch(r"[0-9a-f]+", commit) else None
    return None


def _readable(repo: str) -> str:
    name, at, revision = repo.partition("@")
    return "--".join(name.split("/")[-2:]) + at + revision.replace("/", "--")


def _fixed(repo: str) -> str | None:
    """Identifies the content without a request to the Hub: a full commit, or the state of a local folder."""
    name, _, revision = repo.partition("@")
    if COMMIT.fullmatch(revision):
        return revision
    if not (folder := Path(name).expanduser()).exists():
        return None
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    # The time of a file's last change of state can't be set, as its modification time can (cp -p, rsync, tar).
    states = [(file, file.stat()) for file in files]
    return fingerprint(
        str(folder.resolve()),
        *(f"{file} {there.st_size} {there.st_mtime_ns} {there.st_ctime_ns}" for file, there in states),
    )


def _commit_now(repo: str) -> str | None:
    """Requests the commit of a revision from the Hub; returns None if there is no answer, for whatever reason.

    The timeout is that of the Hub's library: the environment variable HF_HUB_ETAG_TIMEOUT, 10 seconds by default.
    """
    name, _, revision = repo.partition("@")
    try:
        return HfApi().dataset_info(name, revision=revision or None, timeout=HF_HUB_ETAG_TIMEOUT).sha
    except Exception:  # the errors of the HTTP library depend on its version; hub_rows explains what is wrong
        return None


def _commit_of(rows: "Dataset") -> str:
    """Returns the commit that rows were loaded from; if the library does not record it, a hash of the rows."""
    sources = " ".join(map(str, rows.info.download_checksums or ()))
    found = re.search(r"@([0-9a-f]{40})/", sources)
    return found[1] if found else fingerprint(*map(repr, rows))
