"""Data sets of the Hugging Face Hub: read with errors that name a way out."""

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError

from safervlm.errors import RecordError, first_line


def hub_rows(repo: str, local: str) -> datasets.Dataset:
    """The rows of a data set's split "train".

    Args:
        repo: ``owner/name`` or ``owner/name@revision``.
        local: what takes a local one instead, for the error.

    Raises:
        RecordError: no access, or no connection.
    """
    name, _, revision = repo.partition("@")
    try:
        return datasets.load_dataset(name, split="train", revision=revision or None)
    except (DatasetNotFoundError, GatedRepoError) as error:
        raise RecordError(
            f"{repo}: the Hub gives no access ({first_line(error)}): accept the terms at "
            f"https://huggingface.co/datasets/{name}, then run `hf auth login`; or give a local one, {local}"
        ) from None
    except ConnectionError as error:
        raise RecordError(
            f"{repo}: the Hub can't be reached ({first_line(error)}): try again, or give a local one, {local}"
        ) from None


def local_name(repo: str) -> str:
    """The name under which a data set of the Hub is kept here."""
    name, at, revision = repo.partition("@")
    return "--".join(name.split("/")[-2:]) + at + revision.replace("/", "--")
