"""LLaVABench's rating: a model rates a response next to a reference answer, each from 1 to 10.

The prompt is a stimulus of the experiment and is kept exactly as published: by LLaVA (arXiv:2304.08485) for
LLaVA-Bench, assembled as in VLMEvalKit (``vlmeval/dataset/utils/llavabench.py``), where the judge receives only text:
a caption replaces the image. There, a rating that can't be parsed counts as -1; here it is missing.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from safervlm.errors import RecordError
from safervlm.hashing import fingerprint
from safervlm.records import Response
from safervlm.vlm.thinking import answer_of

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
# Sampling of the judge's replies, as published; the temperature is not 0, so that another seed produces another reply.
TEMPERATURE, TOP_P, MAX_NEW_TOKENS = 0.2, 1.0, 1024
SEED = 0  # seed of a rating's first request; each further request uses the next one

NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
SURROGATE = re.compile("[\ud800-\udfff]")
TWO_NUMBERS = re.compile(rf"{NUMBER}(?: +| *, *){NUMBER}")


def rating_prompt(response: Response, swapped: bool = False) -> str:
    """Returns the prompt that asks the judge to rate a response.

    Args:
        response: Response to a question with capability ``rated``, whose ``answer`` is the reference.
        swapped: Puts the response first and the reference second; the published order is the reference first.

    Returns:
        The prompt. An unpaired surrogate, which can't be sent, is replaced by U+FFFD, as viewers display it.
    """
    question = response.question
    first, second = question.answer, answer_of(response.response)
    if swapped:
        first, second = second, first
    prompt = (
        f"[Context]\n{question.context}\n\n[Question]\n{question.prompt}\n\n"
        f"[Assistant 1]\n{first}\n\n[End of Assistant 1]\n\n[Assistant 2]\n{second}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{RULE}\n\n"
    )
    return SURROGATE.sub("\ufffd", prompt)


def read_ratings(text: str) -> tuple[float, float] | None:
    """Parses the ratings of Assistant 1 and 2 from a judge's reply.

    Args:
        text: The reply. Its first line must consist of two numbers from 1 to 10, separated by spaces or a comma.

    Returns:
        The two ratings; None for any other reply.
    """
    found = TWO_NUMBERS.fullmatch(text.split("\n", 1)[0].strip())
    if found is None:
        return None
    first, second = map(float, found.groups())
    return (first, second) if all(1 <= rating <= 10 for rating in (first, second)) else None


def rating_key(judge: Mapping[str, Any], name: str, prompt: str) -> str:
    """Identifies a rating by everything that determines it: the judge, its sampling settings and the prompt.

    Args:
        judge: The judge's description (see :meth:`safervlm.vlm.server.client.Server.describe`).
        name: The id of the question that the judge is asked; with SEED it determines the request's seed.
        prompt: See :func:`rating_prompt`.

    Returns:
        A fingerprint of 16 hexadecimal digits.
    """
    sampling = [TEMPERATURE, TOP_P, MAX_NEW_TOKENS, SEED]
    return fingerprint(json.dumps([dict(judge), sampling], sort_keys=True), name, prompt)


@dataclass(frozen=True, slots=True)
class Rating:
    """A judge's ratings of a response and of its reference.

    Attributes:
        id: The question's id.
        swapped: Whether the response came first in the prompt; False is the published order.
        reference: The reference's rating, 1 to 10; None if there is none.
        response: The response's rating, 1 to 10; None if there is none.
        reason: Why there is no rating, in one line; empty if there is one.
        judge: The model name that was requested.
        model: The model name that the server reported; empty if it reported none.
        text: The judge's complete reply.
        key: See :func:`rating_key`.
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
        """Returns the record for ``ratings.jsonl``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Parses a record of ``ratings.jsonl``.

        Args:
            record: As returned by :meth:`to_dict`.

        Raises:
            RecordError: A field is missing, unknown or of another type; or a rating is not a number from 1 to 10, or is
                None without a reason.
        """
        try:
            rating = cls(**record)
        except TypeError as error:
            raise RecordError(f"ratings.jsonl: {error}; remove the line {dict(record)!s:.80}") from None
        for name in ("id", "reason", "judge", "model", "text", "key"):
            if not isinstance(getattr(rating, name), str):
                raise RecordError(f"ratings.jsonl, {rating.id!s:.80}: {name} is not a text; remove the line")
        for name in ("reference", "response"):
            value = getattr(rating, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= 10
            if not (number or (value is None and rating.reason)):
                raise RecordError(
                    f"ratings.jsonl, {rating.id!s:.80}: {name} is not a number from 1 to 10, got {value!r:.40}; remove "
                    "the line, and the same command asks again"
                )
        return rating
