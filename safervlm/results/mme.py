"""Scores of MME, computed from the responses to its two questions per image."""

import pandas as pd

from safervlm.errors import RecordError
from safervlm.results.clusters import IMAGE_OF_TASK

PERCEPTION_TASKS = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION_TASKS = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ALL_TASKS = (*PERCEPTION_TASKS, *COGNITION_TASKS)


def mme_images(part: pd.DataFrame) -> pd.DataFrame:
    """Computes each image's contribution to MME's score.

    It is the percentage of right responses to its two questions, plus 100 if both are right.

    Args:
        part: Responses, and unanswered questions, whose label is missing: they count as wrong.

    Returns:
        One row per image: category, image, value (0, 50 or 200), both (1 if both are right, else 0).

    Raises:
        RecordError: An image does not have exactly two questions.
    """
    right = (part["label"] == part["answer"]) if "label" in part else pd.Series(False, index=part.index)
    images = part.assign(right=right.astype(float)).groupby(IMAGE_OF_TASK)["right"].agg(["mean", "min", "size"])
    images = images.reset_index()
    odd = images[images["size"] != 2]
    if len(odd):
        first = odd.iloc[0]
        raise RecordError(
            f"MME's rule needs two questions per image, {first['image']!r} ({first['category']}) has {first['size']}; "
            "evaluate the dataset again, or, to score single responses, rename its categories"
        )
    images = images.assign(value=100 * images["mean"] + 100 * images["min"], both=images["min"])
    return images[[*IMAGE_OF_TASK, "value", "both"]]


def pair_answers(answers: pd.DataFrame, unanswered: pd.DataFrame, unfinished: pd.DataFrame) -> pd.DataFrame:
    """Returns the responses to MME's pairs of questions, and the questions without a response, which count as wrong.

    An image with unfinished thinking is excluded, because both of its questions are needed.

    Args:
        answers: Responses that count.
        unanswered: Questions without a response.
        unfinished: Responses that ended inside their reasoning.
    """
    part = pd.concat([answers, unanswered])
    inside = set(zip(unfinished["category"], unfinished["image"], strict=True))
    return part[[pair not in inside for pair in zip(part["category"], part["image"], strict=True)]]


def mme_score(images: pd.DataFrame) -> float:
    """Computes MME's score: the sum over the tasks of the mean of their images' values.

    Args:
        images: Result of :func:`mme_images`.

    Returns:
        The score, in points.
    """
    return float(images.groupby("category")["value"].mean().sum())
