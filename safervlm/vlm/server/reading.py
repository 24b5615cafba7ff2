"""The answer in the body of a chat completion. Nothing that a server says is trusted to be of its type or size."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

UNNAMED = -1  # a token of an answer: a server says how many there are, not which
UNKNOWN = "unknown"  # the finish_reason of an answer whose server names none

# What servers call it when they cut an answer because it is as long as was asked for,
LENGTH = {"length", "max_length", "max_tokens", "max_new_tokens", "max_output_tokens", "length_limit", "token_limit"}
# when their filter cut it or took it away,
FILTERED = {
    *("content_filter", "content_filtered", "filtered", "safety", "image_safety", "blocked", "blocklist"),
    *("prohibited_content", "sensitive", "spii", "guardrail_intervened"),
}
# when the model declined,
REFUSED = {"refusal", "refused"}
# and when the answer did not end at all: it is asked for again.
BROKEN = {
    *("abort", "aborted", "cancel", "cancelled", "canceled", "error", "failed", "failure", "timeout"),
    *("network_error", "insufficient_system_resource"),
}
# Keys whose value decides what is read; one of them twice in an object leaves open which value is meant.
READ = {"error", "choices", "message", "content", "refusal", "finish_reason", "usage"}
READ |= {"prompt_tokens", "completion_tokens"}
TEXTS = (None, "text", "output_text")  # types of parts that are read; a thought is no part of the answer


@dataclass(frozen=True)
class Unnamed(Sequence[int]):
    """The tokens of an answer of which only the number is known; takes no memory, whatever a server says.

    Attributes:
        length: how many there are.
    """

    length: int

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> "Unnamed": ...
    def __getitem__(self, index: int | slice) -> "int | Unnamed":
        if isinstance(index, slice):
            return Unnamed(len(range(self.length)[index]))
        range(self.length)[index]  # raises the IndexError
        return UNNAMED


@dataclass(frozen=True)
class Completion:
    """What a chat completion says.

    Attributes:
        text: the answer, without surrounding white space.
        finish_reason: ``stop``, ``length``, ``refusal`` or ``content_filter``; any other word is the server's own.
        named: the server's own word for it.
        model: what the server says answered; empty where it doesn't say.
        counts: ``prompt_tokens`` and ``completion_tokens``; None where the server says nothing, or nothing possible.
        impossible: what it said instead, by the same names.
    """

    text: str
    finish_reason: str
    named: str
    model: str
    counts: dict[str, int | None] = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)


def parsed(content: bytes, encoding: str | None = None) -> Any:
    """The JSON of a body.

    Args:
        content: UTF-8, UTF-16 or UTF-32, as JSON allows.
        encoding: what the header says, for a body that is none of these.

    Raises:
        ValueError: no JSON, or none that can be read: too deeply nested, or with an important key twice.
    """
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")
    except UnicodeDecodeError:
        if not encoding:
            raise
        try:
            text = content.decode(encoding)
        except LookupError:
            raise ValueError(f"no such encoding: {encoding[:40]!r}") from None
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        for name in READ & found.keys():
            if names.count(name) > 1:
                raise ValueError(f"{name!r} stands twice in an object")
    return found


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= 20 else float(digits)  # of 6,000 digits Python makes no int


def read_count(value: object, most: int) -> int | None:
    """A number of tokens; None for what is none: not whole, negative, no number, or more than the limit."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        return None  # NaN compares with nothing
    return int(value) if math.floor(value) == value else None


def read_completion(body: Any, max_count: int) -> Completion:
    """What a chat completion says; of several choices the first is read.

    Args:
        body: as parsed.
        max_count: the largest number of tokens that is possible.

    Raises:
        ValueError: it contains no answer, or one that did not end.
    """
    if not isinstance(body, Mapping):
        raise ValueError(f"a {type(body).__name__} in place of an object")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ValueError("no choices")
    message = choices[0].get("message")
    if not isinstance(message, Mapping):
        raise ValueError("no message")
    usage = body.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    given = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    counts = {name: read_count(value, max_count) for name, value in given.items()}
    text, reason, named = read_answer(message, choices[0].get("finish_reason"))
    return Completion(
        text=text,
        finish_reason=reason,
        named=named,
        model=model if isinstance(model := body.get("model"), str) else "",
        counts=counts,
        impossible={
            name: repr(value)[:80] if isinstance(value, str | int | float) else type(value).__name__
            for name, value in given.items()
            if value is not None and counts[name] is None
        },
    )


def read_answer(message: Mapping[str, Any], reason: object) -> tuple[str, str, str]:
    """The text of a message, how it ended, and the server's own word for that.

    An answer that ended by itself is one, whatever the server calls its end: an unknown word stays as it is. A filter
    and the limit of tokens may leave no text; without text, anything else is no answer.

    Args:
        message: of the model.
        reason: the finish_reason.

    Raises:
        ValueError: there is no answer, or it did not end.
    """
    if isinstance(reason, Mapping):  # {"type": "stop"}, of engines that pass on their own form
        reason = reason.get("type")
    named = str(reason).strip()[:80] if isinstance(reason, str | int | float) else ""
    word = named.lower()
    content, refusal = read_text(message.get("content")), message.get("refusal")
    if isinstance(message.get("content"), list):
        refused = [part.get("refusal") for part in message["content"] if isinstance(part, Mapping)]
        refusal = refusal or next((part for part in refused if part), None)
    if isinstance(refusal, str):
        refusal = refusal.strip()
    if refusal:
        return (refusal if isinstance(refusal, str) else content or ""), "refusal", named
    if word in BROKEN:
        raise ValueError(f"finish_reason {named!r}: the answer did not end")
    for words, known in ((FILTERED, "content_filter"), (LENGTH, "length"), (REFUSED, "refusal")):
        if word in words:
            return content or "", known, named
    if content is None or not (content or word):
        raise ValueError(f"finish_reason {named!r} with a content of type {type(message.get('content')).__name__}")
    return content, named or UNKNOWN, named


def read_text(content: object) -> str | None:
    """The text of a message's content, a text or a list of parts; None where there is none."""
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, list):
        return None
    parts = [{"text": part} if isinstance(part, str) else part for part in content]
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, Mapping) and part.get("type") in TEXTS and isinstance(part.get("text"), str)
    ]
    return "".join(texts).strip() if texts else None
