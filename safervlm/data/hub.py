"""Reads datasets of the Hugging Face Hub, with error messages that name a remedy."""

from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from safervlm.errors import RecordError, first_line

if TYPE_CHECKING:
    from datasets import Dataset


def hub_rows(repo: str, local: str) -> "Dataset":
    """Loads the rows of a dataset's split "train". The library executes no code of the dataset.

    Images are returned as stored, ``{"bytes": ..., "path": ...}``, also within lists and structs. They are not decoded
    by the library, because it does not limit their size.

    Args:
        repo: Hub repository, ``owner/name`` or ``owner/name@revision``.
        local: How to specify a local dataset instead, for the error message.

    Returns:
        The rows of the split.

    Raises:
        RecordError: Access is denied, the Hub is unreachable, or the library can't read the dataset.
        OSError: A disk error, with the file's name.
    """
    # Imported here: the package takes half a second, and most commands never access the Hub.
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    name, _, revision = repo.partition("@")
    try:
        rows = datasets.load_dataset(name, split="train", revision=revision or None)
        for column, kind in rows.features.items():
            if (as_it_is := undecoded(kind)) != kind:
                rows = rows.cast_column(column, as_it_is)
        return rows
    except (DatasetNotFoundError, GatedRepoError) as error:
        raise RecordError(
            f"{repo}: the Hub denies access ({first_line(error)}): accept the terms at "
            f"https://huggingface.co/datasets/{name}, then run `hf auth login`; or give a local one, {local}"
        ) from None
    except (ConnectionError, TimeoutError, HfHubHTTPError) as error:
        raise RecordError(
            f"{repo}: the Hub can't be reached ({first_line(error)}): try again, or give a local one, {local}"
        ) from None
    # Errors of the HTTP library, which depends on the version of huggingface_hub, and errors in the files: a missing
    # split, inconsistent columns, broken Parquet.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise RecordError(
            f"{repo}: the dataset can't be read ({type(error).__name__}: {first_line(error)}): try again, name "
            f"another one, or give a local one, {local}"
        ) from error


def undecoded(kind: Any) -> Any:
    """Returns a column's type with decoding of images, audio and videos disabled.

    Args:
        kind: Type of the column, or of a value nested in it.
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
