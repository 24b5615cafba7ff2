"""The scores of MME, from the answers to its two questions about an image."""

import pandas as pd

from safervlm.errors import RecordError

PERCEPTION_TASKS = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION_TASKS = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ALL_TASKS = (*PERCEPTION_TASKS, *COGNITION_TASKS)


def mme_images(part: pd.DataFrame) -> pd.DataFrame:
    """What each image brings to MME's score: 100 for two right answers out of two, and 100 more for both.

    Args:
        part: answers, and questions without one, whose label is missing: they are wrong.

    Returns:
        One row an image: category, image, value (0, 50 or 200), both (1 if both are right).

    Raises:
        RecordError: an image that isn't asked about twice.
    """
    right = (part["label"] == part["answer"]) if "label" in part else pd.Series(False, index=part.index)
    images = part.assign(right=right.astype(float)).groupby(["category", "image"])["right"].agg(["mean", "min", "size"])
    images = images.reset_index()
    odd = images[images["size"] != 2]
    if len(odd):
        first = odd.iloc[0]
        raise RecordError(
            f"MME's rule needs two questions an image, {first['image']!r} ({first['category']}) has {first['size']}; "
            "evaluate the set again, or, to score single answers, name its categories otherwise than MME's tasks"
        )
    images = images.assign(value=100 * images["mean"] + 100 * images["min"], both=images["min"])
    return images[["category", "image", "value", "both"]]


def mme_score(images: pd.DataFrame) -> float:
    """The sum over the tasks of their images' mean."""
    return float(images.groupby("category")["value"].mean().sum())
