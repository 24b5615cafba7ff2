"""The first token of an answer with its alternatives, as a server returns them (``logprobs``, ``top_logprobs``)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safervlm.records import Question
from safervlm.vlm.base import Answer, Generation, Unanswered, WordProbabilities
from safervlm.vlm.odds import of_first_tokens

# Sent for the odds: one token of the model's own distribution, with as many alternatives as OpenAI's API returns.
SETTINGS_OF_ODDS: dict[str, Any] = {
    "temperature": 1,
    "top_p": 1,
    "max_completion_tokens": 1,
    "logprobs": True,
    "top_logprobs": 20,
}
ROUNDING = 1e-3  # by which a log-probability may exceed 0


@dataclass(frozen=True)
class FirstToken(Generation):
    """A generated token with its alternatives.

    Attributes:
        first: The tokens that a server returned for the first place, each with its log-probability.
    """

    first: tuple[tuple[str, float], ...] = ()


def read_first_token(choice: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """Returns the tokens of the first place of a choice, with their log-probabilities.

    Args:
        choice: The choice of a chat completion; values that are not of the documented type count as absent.

    Returns:
        The alternatives, and the generated token if it is none of them; empty if there are no log-probabilities.
    """
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(content, list) or not content or not isinstance(content[0], Mapping):
        return ()
    top = content[0].get("top_logprobs")
    found = [each for each in map(_read, top if isinstance(top, list) else ()) if each is not None]
    own = _read(content[0])
    return tuple([own, *found] if own is not None and own[0] not in dict(found) else found)


def _read(entry: Any) -> tuple[str, float] | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("token"), str):
        return None
    value = entry.get("logprob")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > ROUNDING:
        return None
    return entry["token"], min(float(value), 0.0)


def words_of(question: Question, answer: Answer) -> WordProbabilities | Unanswered:
    """Sums the first tokens that are a word of a question's answer.

    Args:
        question: The question.
        answer: The outcome of its request.
    """
    if isinstance(answer, Unanswered):
        return answer
    if not isinstance(answer, FirstToken):
        return Unanswered(f"{question.id}: no log-probabilities, the response ended with {answer.finish_reason}")
    return of_first_tokens(question, answer.first)
