"""Outcomes of a request other than a response, and their derivation from the status and body of a failure."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from safervlm.vlm.base import Generation, Unanswered

FILTERS = {"content_filter", "content_policy_violation", "image_content_policy_violation", "invalid_prompt"}
RETRY_LATER = {429, 502, 503}
RETRY = {408, 409}
BAD_REQUEST = {400, 413, 415, 422}
BAD_ADDRESS = {405, 407, 410, 426}
SETTINGS = {
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "max_completion_tokens": "sampling.max_new_tokens",
    "max_tokens": "sampling.max_new_tokens",
    "seed": "seed_everything",
}
UNKNOWN = re.compile(r"not? (support|permit|allow)|unsupported|unrecogni|unknown|unexpected|extra (input|field)", re.I)
EXAMINED = 10_000  # characters of a body that are searched for a parameter's name


@dataclass(frozen=True)
class TransientFailure:
    """A transient failure: the question is asked again.

    Attributes:
        reason: Reason in one line.
        by_server: Whether any question would have failed: the server backs off, and others take over.
        said: Whether the server itself reported the failure, as opposed to being unreachable.
        pause: Pause that the server requests, in seconds; None if it states none.
    """

    reason: str
    by_server: bool = False
    said: bool = False
    pause: float | None = None


@dataclass(frozen=True)
class RejectedParameter:
    """The server rejects a parameter; the question is asked again at once without it.

    Attributes:
        name: Name of the parameter.
        reason: Reason in one line.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class UnusableServer:
    """The server can't answer any question: it is excluded, and others take over.

    Attributes:
        reason: Reason in one line.
    """

    reason: str


@dataclass(frozen=True)
class FatalRejection:
    """No server can answer any question before the user corrects something: no more requests are sent.

    Attributes:
        reason: Reason in one line, beginning with the argument to correct.
    """

    reason: str


Outcome = Generation | TransientFailure | RejectedParameter | UnusableServer | FatalRejection | Unanswered


@dataclass(frozen=True)
class Rejection:
    """A response with a status of 300 or above, or an error object in a response with status 200.

    Attributes:
        status: HTTP status.
        code: Error code of the server; empty if it states none.
        kind: Error type of the server; empty if it states none.
        param: Name of the parameter at fault; empty if the server states none.
        message: Message in one line, cleaned.
        said: Beginning of the whole body.
        location: Host that a redirect points to; empty for none.
        pause: Pause that the server requests, in seconds; None if it states none.
    """

    status: int
    code: str
    kind: str
    param: str
    message: str
    said: str
    location: str = ""
    pause: float | None = None


def parse_rejection(
    status: int, body: object, headers: Mapping[str, str], message: str, clean: Callable[[object], str]
) -> Rejection:
    """Parses a failed response; fields that are not of the documented type count as absent.

    Args:
        status: HTTP status.
        body: Error object or text.
        headers: Headers of the response.
        message: Message to show if the body has none.
        clean: Function that makes one safe line of a server's text.
    """
    given = body if isinstance(body, Mapping) else {}
    texts = {name: str(given[name]) for name in ("code", "type", "param") if isinstance(given.get(name), str | int)}
    said = given.get("message")
    location = headers.get("location", "")
    return Rejection(
        status,
        texts.get("code", ""),
        texts.get("type", ""),
        texts.get("param", ""),
        clean(said if isinstance(said, str) and said else message),
        _text(body)[:EXAMINED],
        clean(host_of(location)) if location else "",
        seconds_to_wait(headers.get("retry-after")),
    )


def _text(body: object) -> str:
    try:
        return str(body)
    except RecursionError:
        return ""


def outcome_of(
    refusal: Rejection,
    question: str,
    address: str,
    sent: Mapping[str, Any],
    variable: str,
    has_key: bool,
    answered: bool = False,
) -> Outcome:
    """Returns what a failed response means for the question and the server.

    Args:
        refusal: The failed response.
        question: Id of the question.
        address: Base URL of the server.
        sent: Parameters of the request.
        variable: Name of the environment variable of the API key.
        has_key: Whether that variable contains a key.
        answered: Whether the server has answered another question; a rejection then concerns only this question.
    """
    status, message, model = refusal.status, refusal.message, sent["model"]
    if status == 400 and FILTERS & {refusal.code, refusal.kind}:
        return Generation([], "", "content_filter")
    if status < 400:
        where = f" to {refusal.location}" if refusal.location else ""
        return UnusableServer(f"it redirects{where} ({status}), which is not followed; name the address itself")
    if refusal.code == "insufficient_quota" or status == 402:
        return FatalRejection(f"vlm: {address}: the account is used up ({message}); the same command resumes")
    if status in RETRY_LATER:
        return TransientFailure(f"{status}: {message}", by_server=True, said=True, pause=refusal.pause)
    if status >= 500 or status in RETRY:
        return TransientFailure(f"{status}: {message}", pause=refusal.pause)
    if status == 401:
        known = "rejects the key in" if has_key else "asks for a key, and there is none in"
        return FatalRejection(
            f"vlm.api_key_variable: {address} {known} the environment variable {variable} (401); "
            "export it, the same command resumes"
        )
    if status == 403 and not answered:
        return FatalRejection(
            f"vlm.api_key_variable: {address} denies access to the key in {variable} (403: "
            f"{message}); use one that may ask {model}"
        )
    if status == 404:
        return FatalRejection(
            f"vlm.model: {address} has no {model!r}, or isn't a base URL, which mostly ends in /v1 (404: "
            f"{message}); {address}/models lists what it has"
        )
    if status in BAD_ADDRESS or (status not in BAD_REQUEST and not answered):
        return FatalRejection(f"vlm.addresses: {address} rejects the request ({status}: {message}); is it a base URL?")
    return _of_the_question(refusal, question, address, sent)


def _of_the_question(refusal: Rejection, question: str, address: str, sent: Mapping[str, Any]) -> Outcome:
    """Returns the outcome of a request that the server rejects: a parameter or the question is at fault."""
    message = refusal.message
    named = refusal.param if refusal.param in SETTINGS and refusal.param in sent else None
    if UNKNOWN.search(refusal.said):
        named = named or next(
            (name for name in SETTINGS if name in sent and re.search(rf"\b{name}\b", refusal.said)), None
        )
        if named in ("max_completion_tokens", "seed") or (named is not None and sent[named] == 1):
            return RejectedParameter(named, message)
    if named is not None:
        return FatalRejection(
            f"{SETTINGS[named]}: {address} doesn't take {sent[named]!r} as {named} for {sent['model']} "
            f"({message}); give another value (a model that reasons takes 1 for temperature and top_p)"
        )
    return Unanswered(f"{question}: {address} can't take it ({refusal.status}: {message})")


def host_of(location: str) -> str:
    """Returns only the host of a Location header; the rest may contain secrets.

    Args:
        location: Value of the header.
    """
    try:
        return urlsplit(location).hostname or "another path of the same host"
    except ValueError:
        return "no valid address"


def seconds_to_wait(retry_after: str | None) -> float | None:
    """Parses a Retry-After header.

    Args:
        retry_after: Value of the header, in seconds or as a date; None if there is none.

    Returns:
        Seconds to wait, at least 0; None if there is no header or no finite number.
    """
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
