"""Data sets of the Hugging Face Hub: read with errors that name a way out."""

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from safervlm.errors import RecordError, first_line


def hub_rows(repo: str, local: str) -> datasets.Dataset:
    """The rows of a data set's split "train". No code of the data set is run: the library has no way to.

    Args:
        repo: ``owner/name`` or ``owner/name@revision``.
        local: what takes a local one instead, for the error.

    Raises:
        RecordError: no access, no connection, or a data set that the library can't read.
        OSError: of the disk, with the file's name.
    """
    name, _, revision = repo.partition("@")
    try:
        return datasets.load_dataset(name, split="train", revision=revision or None)
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


def local_name(repo: str) -> str:
    """The name under which a data set of the Hub is kept here."""
    name, at, revision = repo.partition("@")
    return "--".join(name.split("/")[-2:]) + at + revision.replace("/", "--")
