"""Parses the body of a chat completion. No field of a server's response is trusted to have the right type or size."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from safervlm.records import THINKING_UNFINISHED
from safervlm.vlm.server.first_token import read_first_token
from safervlm.vlm.thinking import Thinking, unopened_closing_mark

UNKNOWN_TOKEN = -1  # unknown token id: a server states the number of tokens, not their ids
UNKNOWN = "unknown"  # finish_reason of a response for which the server states none

# Finish reasons of servers: the response reached the token limit.
LENGTH = {"length", "max_length", "max_tokens", "max_new_tokens", "max_output_tokens", "length_limit", "token_limit"}
# A filter truncated or removed the response.
FILTERED = {
    *("content_filter", "content_filtered", "filtered", "safety", "image_safety", "blocked", "blocklist"),
    *("prohibited_content", "sensitive", "spii", "guardrail_intervened"),
}
# The model refused.
REFUSED = {"refusal", "refused"}
# The response is incomplete; the question is asked again.
BROKEN = {
    *("abort", "aborted", "cancel", "cancelled", "canceled", "error", "failed", "failure", "timeout"),
    *("network_error", "insufficient_system_resource"),
}
KNOWN = ((FILTERED, "content_filter"), (LENGTH, "length"), (REFUSED, "refusal"))
# Keys that affect the result. A duplicate of one of them in an object would be ambiguous.
READ = {"error", "choices", "message", "content", "refusal", "finish_reason", "usage"}
READ |= {"prompt_tokens", "completion_tokens", "reasoning_content", "reasoning"}
READ |= {"logprobs", "top_logprobs", "token", "logprob"}
# Names under which servers return reasoning separately from the answer.
REASONING = ("reasoning_content", "reasoning")
PARTS = ("thinking", "reasoning")  # types of content parts with reasoning, under a key of the same name
TEXTS = (None, "text", "output_text")  # types of content parts that belong to the response; reasoning doesn't


@dataclass(frozen=True)
class UnknownTokens(Sequence[int]):
    """Tokens of a response of which only the number is known; takes constant memory, whatever number a server states.

    Attributes:
        length: Number of tokens.
    """

    length: int

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> "UnknownTokens": ...
    def __getitem__(self, index: int | slice) -> "int | UnknownTokens":
        if isinstance(index, slice):
            return UnknownTokens(len(range(self.length)[index]))
        range(self.length)[index]  # raises the IndexError
        return UNKNOWN_TOKEN


@dataclass(frozen=True)
class Completion:
    """Parsed chat completion.

    Attributes:
        text: The response, without surrounding white space and without reasoning.
        finish_reason: ``stop``, ``length``, ``refusal``, ``content_filter`` or ``thinking unfinished``; otherwise the
            server's own value.
        named: The finish reason as the server states it.
        model: Name of the model according to the server; empty if it states none.
        counts: ``prompt_tokens`` and ``completion_tokens``; None if the server states none, or an impossible number.
        impossible: The impossible numbers, by the same names.
        reasoning: The reasoning before the answer; empty for none.
        closing: The closing mark of reasoning, if the response lacks the opening one; None otherwise.
        first: The tokens that are returned for the first place, with their log-probabilities; empty for none.
    """

    text: str
    finish_reason: str
    named: str
    model: str
    counts: dict[str, int | None] = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)
    reasoning: str = ""
    closing: str | None = None
    first: tuple[tuple[str, float], ...] = ()


def parsed(content: bytes, encoding: str | None = None) -> Any:
    """Parses the JSON of a response body.

    Args:
        content: Body, in UTF-8, UTF-16 or UTF-32, as JSON allows.
        encoding: Charset in the header, for a body in none of these; None if there is none.

    Raises:
        ValueError: The body is not JSON, is nested too deeply, or has a duplicate of a key that affects the result.
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
                raise ValueError(f"{name!r} occurs twice in an object")
    return found


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= 20 else float(digits)  # int() rejects very long digit strings


def read_count(value: object, most: int) -> int | None:
    """Returns a number of tokens; None for anything but an integral number within the limit.

    Args:
        value: Value in the body.
        most: Largest plausible number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        return None  # comparisons with NaN are false
    return int(value) if math.floor(value) == value else None


def read_completion(body: Any, max_count: int, thinking: Thinking) -> Completion:
    """Parses a chat completion; of several choices, the first is used.

    Args:
        body: The parsed JSON.
        max_count: Largest plausible number of tokens.
        thinking: How reasoning inside the text is marked.

    Raises:
        ValueError: The body contains no response, or an incomplete one.
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
    text, reason, named, reasoning = read_answer(message, choices[0].get("finish_reason"), thinking)
    if reason == "length" and not text and _hidden_reasoning(usage):
        reason = THINKING_UNFINISHED
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
        reasoning=reasoning,
        closing=unopened_closing_mark(read_text(message.get("content")) or "", thinking),
        first=read_first_token(choices[0]),
    )


def _hidden_reasoning(usage: Mapping[str, Any]) -> bool:
    """Returns whether the server counts tokens of reasoning, which it doesn't return."""
    details = usage.get("completion_tokens_details")
    return isinstance(details, Mapping) and bool(read_count(details.get("reasoning_tokens"), 2**53))


def read_answer(message: Mapping[str, Any], reason: object, thinking: Thinking) -> tuple[str, str, str, str]:
    """Returns the answer of a message, its finish reason, the server's own value of it, and the reasoning.

    A response that the model ended is valid with any finish reason: an unknown one is kept. A filter and the token
    limit may leave no text. A message with reasoning and no answer is unfinished thinking. Otherwise, a message without
    text is not a response.

    Args:
        message: The model's message.
        reason: The finish_reason.
        thinking: How reasoning inside the text is marked.

    Raises:
        ValueError: There is no response, or an incomplete one.
    """
    if isinstance(reason, Mapping):  # {"type": "stop"}, from engines that forward their own format
        reason = reason.get("type")
    named = str(reason).strip()[:80] if isinstance(reason, str | int | float) else ""
    word = named.lower()
    content, refusal = read_text(message.get("content")), message.get("refusal")
    if isinstance(message.get("content"), list):
        refused = [part.get("refusal") for part in message["content"] if isinstance(part, Mapping)]
        refusal = refusal or next((part for part in refused if part), None)
    if isinstance(refusal, str):
        refusal = refusal.strip()
    separate = read_reasoning(message)
    if refusal:
        return (refusal if isinstance(refusal, str) else content or ""), "refusal", named, separate
    if word in BROKEN:
        raise ValueError(f"finish_reason {named!r}: the response did not end")
    known = next((known for words, known in KNOWN if word in words), None)
    parts = thinking.split(content or "", beside=bool(separate))
    reasoning = "\n\n".join(dict.fromkeys(text for text in (separate, parts.reasoning) if text))
    if known in (None, "length") and (parts.unfinished or (separate and not content)):
        return "", THINKING_UNFINISHED, named, reasoning
    if known is None and (content is None or not (content or word)):
        raise ValueError(f"finish_reason {named!r} with a content of type {type(message.get('content')).__name__}")
    return parts.answer, known or named or UNKNOWN, named, reasoning


def read_reasoning(message: Mapping[str, Any]) -> str:
    """Returns the reasoning that a server returns separately from the answer; empty for none.

    Args:
        message: The model's message.
    """
    given = [message.get(name) for name in REASONING]
    if isinstance(content := message.get("content"), list):
        given += [part.get(part["type"]) for part in content if isinstance(part, Mapping) and part.get("type") in PARTS]
    return next((text for text in map(read_text, given) if text), "")


def read_text(content: object) -> str | None:
    """Returns the text of a message's content.

    Args:
        content: A string, or a list of parts.

    Returns:
        The text without surrounding white space; None if there is none.
    """
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
