"""LLaVABench's rating: another model rates a response beside a reference answer, each from 1 to 10.

The prompt is a stimulus of the experiment, so it stands exactly as published: by LLaVA (arXiv:2304.08485) for
LLaVA-Bench, put together as VLMEvalKit does it (``vlmeval/dataset/utils/llavabench.py``), where the judge reads text
alone: a caption stands for the image. There a verdict that can't be read counts as -1; here it is none.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from safervlm.errors import RecordError
from safervlm.hashing import fingerprint
from safervlm.records import Response

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with a few sentences describing the image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
)
# In a run folder: what the judge gave.
RATINGS = "ratings.jsonl"
TEMPERATURE, TOP_P, MAX_NEW_TOKENS = 0.2, 1.0, 1024
SEED = 0  # of a rating's first request; each that follows takes the next

NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
SURROGATE = re.compile("[\ud800-\udfff]")
TWO_NUMBERS = re.compile(rf"{NUMBER}(?: +| *, *){NUMBER}")


def rating_prompt(response: Response, swapped: bool = False) -> str:
    """What the judge is asked about a response.

    Args:
        response: to a question with ``capability`` "rated".
        swapped: puts the response first and the reference second; published is the reference first.

    Returns:
        The prompt; half of a surrogate pair, which can't be sent, is replaced by U+FFFD, as every viewer shows it.
    """
    question = response.question
    first, second = question.answer, response.response
    if swapped:
        first, second = second, first
    prompt = (
        f"[Context]\n{question.context}\n\n[Question]\n{question.prompt}\n\n"
        f"[Assistant 1]\n{first}\n\n[End of Assistant 1]\n\n[Assistant 2]\n{second}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{RULE}\n\n"
    )
    return SURROGATE.sub("\ufffd", prompt)


def read_ratings(text: str) -> tuple[float, float] | None:
    """The ratings of Assistant 1 and 2 in a judge's answer.

    Args:
        text: the answer; its first line has to hold two numbers from 1 to 10, with spaces or a comma in between, and
            nothing else.

    Returns:
        None for any other answer: it is never read as a score.
    """
    found = TWO_NUMBERS.fullmatch(text.split("\n", 1)[0].strip())
    if found is None:
        return None
    first, second = map(float, found.groups())
    return (first, second) if all(1 <= rating <= 10 for rating in (first, second)) else None


def rating_key(judge: Mapping[str, Any], name: str, prompt: str) -> str:
    """What tells a rating from another: the judge, how it draws, and what it is asked.

    Args:
        judge: its description (see :meth:`safervlm.vlm.server.client.Server.describe`).
        name: the id that the judge's question has; with SEED it gives the request's seed.
        prompt: see :func:`rating_prompt`.
    """
    sampling = [TEMPERATURE, TOP_P, MAX_NEW_TOKENS, SEED]
    return fingerprint(json.dumps([dict(judge), sampling], sort_keys=True), name, prompt)


@dataclass(frozen=True, slots=True)
class Rating:
    """What a judge gave a response and its reference.

    Attributes:
        id: the question's id.
        swapped: whether the response stood first; False as published.
        reference: the reference's rating, and
        response: the response's; both None where there is none.
        reason: why there is none, in one line; empty where there is one.
        judge: the name by which the judge was asked.
        model: what the server says answered; empty where it doesn't say.
        text: the judge's whole answer.
        key: see :func:`rating_key`.
    """

    id: str
    swapped: bool
    reference: float | None
    response: float | None
    reason: str
    judge: str
    model: str
    text: str
    key: str

    def to_dict(self) -> dict[str, Any]:
        """The record of ``ratings.jsonl``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            RecordError: a field is missing, unknown or of another type, or a number is no rating.
        """
        try:
            rating = cls(**record)
        except TypeError as error:
            raise RecordError(f"{RATINGS}: {error}; remove the line {dict(record)!s:.80}") from None
        for name in ("id", "reason", "judge", "model", "text", "key"):
            if not isinstance(getattr(rating, name), str):
                raise RecordError(f"{RATINGS}, {rating.id!s:.80}: {name} is no text; remove the line")
        for name in ("reference", "response"):
            value = getattr(rating, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= 10
            if not (number or (value is None and rating.reason)):
                raise RecordError(
                    f"{RATINGS}, {rating.id!s:.80}: {name} is no number from 1 to 10, got {value!r:.40}; remove the "
                    "line, and the same command asks again"
                )
        return rating
