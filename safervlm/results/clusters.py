"""Keys of a table of responses: the columns that identify an image, a concept, a stratum, a question.

Intervals, differences and pairs of responses are computed only from these definitions. Names repeat between datasets,
so that every key contains the dataset. The tables are those of :func:`safervlm.results.runs.load_run`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from safervlm.statistics.intervals import Numbers

STRATUM = ["dataset", "category"]  # of a concept: other concepts would be of the same category
CONCEPT = [*STRATUM, "concept"]
IMAGE = ["dataset", "image"]
IMAGE_OF_CONCEPT = [*CONCEPT, "image"]
QUESTION = [*IMAGE_OF_CONCEPT, "capability", "prompt_number"]
IMAGE_OF_TASK = ["category", "image"]  # of MME, a single dataset, whose tasks use the same image names

TEXT_ONLY = "alignment_text_only"
# Capabilities whose questions name a concept and show no image.
WITHOUT_IMAGE = (TEXT_ONLY, "context_text_only")


def cluster_numbers(rows: pd.DataFrame, keys: Sequence[str]) -> Numbers:
    """Numbers the clusters of responses.

    Args:
        rows: The responses.
        keys: The columns that identify a cluster, such as :data:`IMAGE`.

    Returns:
        (responses,) the cluster of each, as a number from 0 without gaps, in the sorted order of the keys.
    """
    return rows.groupby(list(keys), sort=True).ngroup().to_numpy()


def concepts_of(rows: pd.DataFrame) -> tuple[Numbers, Numbers, Numbers]:
    """Numbers the concepts of responses, and their datasets and categories.

    Args:
        rows: The responses.

    Returns:
        (responses,) the concept of each, and (concepts,) dataset and category of each, as numbers.
    """
    concepts = cluster_numbers(rows, CONCEPT)
    first = np.unique(concepts, return_index=True)[1]
    datasets, categories = (
        np.unique(rows[column].to_numpy(object)[first], return_inverse=True)[1] for column in STRATUM
    )
    return concepts, datasets, categories


def units_of(rows: pd.DataFrame) -> "list[pd.Series[Any]]":
    """Returns the keys that group responses by unit.

    A unit is an image of a concept; without an image (:data:`WITHOUT_IMAGE`) it is a single response.

    Args:
        rows: The responses.
    """
    unit = rows["image"].where(~rows["capability"].isin(WITHOUT_IMAGE), rows["id"])
    return [*(rows[name] for name in IMAGE_OF_CONCEPT), unit.rename("unit")]
