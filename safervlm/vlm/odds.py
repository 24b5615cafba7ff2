"""Log-odds of an answer's first word: how strongly a VLM leans to the word that means unsafe.

The words are Yes and No (:func:`safervlm.protocol.answer_words`), each as published and in lower case. A local model
scores the words as completions in one pass, in the form in which its template writes a given answer: with or without a
space before it and, for a thinking model, after an empty block of reasoning or without one. A server returns the
log-probabilities of the most probable first tokens. Nothing is generated, and no response depends on it.

Shapes: C completions in total, T tokens of the longest completion.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from math import exp, inf, isfinite, log
from typing import Any, Self

from safervlm.errors import RecordError
from safervlm.io.fields import check_fields
from safervlm.protocol import SAFE, UNSAFE, answer_words
from safervlm.records import Example, Failure, Question
from safervlm.vlm.base import Scores, Unanswered, WordProbabilities


@dataclass(frozen=True, slots=True)
class Odds:
    """The log-odds of a question's answer, a line of ``odds.jsonl``.

    Attributes:
        id: Id of the question.
        log_odds: log P(the word that means unsafe) - log P(the word that means safe); positive means unsafe.
        mass: P(either word), 0 to 1. If it is small, answers mostly begin otherwise, and the odds are not informative.
        bound: Whether only one of the words is among the tokens that a server returned; the other one then gets the
            probability of the least probable of these, which is its upper bound.
    """

    id: str
    log_odds: float
    mass: float
    bound: bool = False

    @classmethod
    def of(cls, question: Question, found: WordProbabilities) -> Self:
        """Computes the log-odds from the log-probabilities of the words.

        Args:
            question: The question.
            found: Log-probabilities of its words.
        """
        mass = min(1.0, exp(found.unsafe) + exp(found.safe))
        return cls(question.id, found.unsafe - found.safe, mass, found.bound)

    def to_dict(self) -> dict[str, Any]:
        """Returns the record of ``odds.jsonl``; ``bound`` only if set."""
        record = asdict(self)
        return record if self.bound else {name: record[name] for name in record if name != "bound"}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Parses a record written by :meth:`to_dict`; other fields are ignored.

        Args:
            record: Fields of the record.

        Raises:
            KeyError: A field is missing.
            RecordError: A field has a value of another type, or is out of range.
        """
        check_fields({"bound": False} | dict(record), id=str, bound=bool)
        for name, least, most in (("log_odds", -inf, inf), ("mass", 0.0, 1.0)):
            value = record[name]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not isfinite(value) or not least <= value <= most:
                raise RecordError(f"the field {name!r} must be a number{'' if most == inf else ' from 0 to 1'}")
        return cls(record["id"], float(record["log_odds"]), float(record["mass"]), record.get("bound", False))


class OddsFailure(Failure):
    """A question without log-odds, a line of ``odds-failed.jsonl``."""


def word_forms(word: str) -> tuple[str, str]:
    """Returns the two forms of a word that are scored.

    Args:
        word: ``Yes`` or ``No``.
    """
    return word, word.lower()


def has_odds(question: Question) -> bool:
    """Returns whether a question's answer begins with a word that means safe or unsafe.

    Args:
        question: The question.
    """
    return bool(answer_words(question.capability))


def with_words(question: Question) -> Example:
    """Returns a question with its words as completions: first those that mean unsafe, then those that mean safe.

    Args:
        question: A question that :func:`has_odds`.
    """
    words = answer_words(question.capability)
    return Example(question, (*word_forms(words[UNSAFE]), *word_forms(words[SAFE])))


def probabilities(
    questions: Sequence[Question], scores: Scores, text: Callable[[list[int]], str]
) -> list[WordProbabilities | Unanswered]:
    """Sums the scores of the words.

    The probability of a word is that of its tokens, usually one, without the end token. An empty block of reasoning,
    with which all of them begin, is given and not counted; a space is counted. Forms with the same tokens count once.

    Args:
        questions: The questions, each with the completions of :func:`with_words`.
        scores: Scores of the completions.
        text: Returns the text of tokens.

    Returns:
        For each question the log-probabilities, or the reason why there are none.
    """
    each = len(word_forms(""))
    found: list[WordProbabilities | Unanswered] = []
    tokens, logprobs, lengths = scores.target.tolist(), scores.logprobs.tolist(), scores.mask.sum(1).tolist()
    for number, question in enumerate(questions):
        rows = range(2 * each * number, 2 * each * (number + 1))
        written = [tuple(tokens[row][: lengths[row] - 1]) for row in rows]
        shared = sum(1 for _ in takewhile(lambda those: len(set(those)) == 1, zip(*written, strict=False)))
        if not text(list(written[0][:shared])).strip():
            shared = 0
        sides: list[dict[tuple[int, ...], float]] = [{}, {}]
        for place, row in enumerate(rows):
            sides[place // each][written[place][shared:]] = sum(logprobs[row][shared : lengths[row] - 1])
        if sides[0].keys() & sides[1].keys():
            words = " and ".join(answer_words(question.capability).values())
            found.append(Unanswered(f"{question.id}: the tokenizer has the same tokens for {words}"))
        else:
            found.append(WordProbabilities(log_sum(sides[0].values()), log_sum(sides[1].values())))
    return found


def of_first_tokens(question: Question, first: Sequence[tuple[str, float]]) -> WordProbabilities | Unanswered:
    """Sums the probabilities of the first tokens that are one of the words, in any case and with any space around.

    Args:
        question: The question.
        first: The most probable first tokens of the answer, each with its log-probability.

    Returns:
        The log-probabilities of the words, or the reason why there are none.
    """
    words = answer_words(question.capability)
    sides = [
        [logprob for token, logprob in first if token.strip().casefold() == words[label].casefold()]
        for label in (UNSAFE, SAFE)
    ]
    if not any(sides):
        return Unanswered(
            f"{question.id}: neither {' nor '.join(words.values())} is among the {len(first)} most probable first "
            "tokens of the answer"
        )
    least = min(logprob for _, logprob in first)
    unsafe, safe = (log_sum(side) if side else least for side in sides)
    return WordProbabilities(unsafe, safe, bound=not all(sides))


def log_sum(logprobs: "Sequence[float] | Any") -> float:
    """Returns the logarithm of a sum of probabilities.

    Args:
        logprobs: Their logarithms, at least one.
    """
    values = list(logprobs)
    most = max(values)
    return most + log(sum(exp(value - most) for value in values))
