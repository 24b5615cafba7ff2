"""Data sets of the Hugging Face Hub: read with errors that name a way out."""

from dataclasses import is_dataclass, replace
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from safervlm.errors import RecordError, first_line


def hub_rows(repo: str, local: str) -> datasets.Dataset:
    """The rows of a dataset's split "train". No code of the dataset is run: the library has no way to.

    Images are given as they are in the file, ``{"bytes": ..., "path": ...}``, also within lists and structs: none is
    decoded by the library, which knows no bounds.

    Args:
        repo: ``owner/name`` or ``owner/name@revision``.
        local: what takes a local one instead, for the error.

    Raises:
        RecordError: no access, no connection, or a data set that the library can't read.
        OSError: of the disk, with the file's name.
    """
    name, _, revision = repo.partition("@")
    try:
        rows = datasets.load_dataset(name, split="train", revision=revision or None)
        for column, kind in rows.features.items():
            if (as_it_is := undecoded(kind)) != kind:
                rows = rows.cast_column(column, as_it_is)
        return rows
    except (DatasetNotFoundError, GatedRepoError) as error:
        raise RecordError(
            f"{repo}: the Hub gives no access ({first_line(error)}): accept the terms at "
            f"https://huggingface.co/datasets/{name}, then run `hf auth login`; or give a local one, {local}"
        ) from None
    except (ConnectionError, TimeoutError, HfHubHTTPError) as error:
        raise RecordError(
            f"{repo}: the Hub can't be reached ({first_line(error)}): try again, or give a local one, {local}"
        ) from None
    # Errors of the HTTP library, which changes with the Hub's, and whatever is met in somebody's files: a split that
    # isn't there, columns that don't fit, broken Parquet.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise RecordError(
            f"{repo}: the data set can't be read ({type(error).__name__}: {first_line(error)}): try again, name "
            f"another one, or give a local one, {local}"
        ) from error


def undecoded(kind: Any) -> Any:
    """The type of a column whose images (and sounds and videos) are left as they are in the file.

    Args:
        kind: of the column, or of what is within it.
    """
    if isinstance(kind, dict):
        return {name: undecoded(part) for name, part in kind.items()}
    if isinstance(kind, list):
        return [undecoded(part) for part in kind]
    if not is_dataclass(kind) or isinstance(kind, type):
        return kind
    if hasattr(kind, "decode"):
        return replace(kind, decode=False)
    return replace(kind, feature=undecoded(kind.feature)) if hasattr(kind, "feature") else kind


def local_name(repo: str) -> str:
    """The name under which a data set of the Hub is kept here."""
    name, at, revision = repo.partition("@")
    return "--".join(name.split("/")[-2:]) + at + revision.replace("/", "--")
