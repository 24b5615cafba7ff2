"""One request to a server, and its outcome. Needs the extra ``api``."""

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import openai

from safervlm.errors import first_line
from safervlm.io.tables import say
from safervlm.vlm.base import Generation, Unanswered
from safervlm.vlm.server.cleaning import Cleaner
from safervlm.vlm.server.first_token import FirstToken
from safervlm.vlm.server.host import Host
from safervlm.vlm.server.outcomes import (
    FatalRejection,
    Outcome,
    RejectedParameter,
    Rejection,
    TransientFailure,
    outcome_of,
    parse_rejection,
)
from safervlm.vlm.server.reading import Completion, UnknownTokens, parsed, read_completion
from safervlm.vlm.server.transport import BodyError, BodyTooLargeError, client_for
from safervlm.vlm.thinking import Thinking


class Requests:
    """Sends the requests of a batch. It has the API key, and is discarded with the batch.

    Args:
        hosts: The servers; their HTTP clients are created here.
        key: API key; None for none.
        variable: Name of the environment variable of the key, for messages.
        timeout: Maximum time for a request, in seconds.
        connect: Maximum time to connect to a server, in seconds.
        max_body: Maximum size of a response body, in bytes.
        max_count: Largest plausible number of tokens.
        concurrency: Number of connections to keep alive.
        log: Callback that receives the log entry of each request.
        thinking: How reasoning inside a response is marked.
    """

    def __init__(
        self,
        hosts: list[Host],
        key: str | None,
        variable: str,
        timeout: float,
        connect: float,
        max_body: int,
        max_count: int,
        concurrency: int,
        log: Callable[[dict[str, Any]], None],
        thinking: Thinking,
    ) -> None:
        self.hosts, self.has_key, self.variable, self.timeout = hosts, key is not None, variable, timeout
        self.max_count, self.log, self.cleaner, self.thinking = max_count, log, Cleaner(key), thinking
        for host in hosts:
            host.client = openai.AsyncOpenAI(
                base_url=host.address,
                api_key=key or "none",
                timeout=openai.Timeout(timeout, connect=min(connect, timeout)),
                max_retries=0,
                http_client=client_for(host.address, key or "none", max_body, concurrency),
            )

    async def close(self) -> None:
        """Closes the connections."""
        for host in self.hosts:
            client, host.client, host.busy = host.client, None, 0  # the client contains the key
            if client is not None:
                await client.close()

    async def send(self, host: Host, question: str, request: Mapping[str, Any]) -> tuple[Outcome, int | None]:
        """Sends one request, and reports its log entry to ``log``.

        Args:
            host: The server.
            question: Id of the question.
            request: Parameters of the request.

        Returns:
            The outcome, and the number of prompt and response tokens; None if there is no completion.
        """
        sent = dict(request)
        for name in host.omitted:
            value = sent.pop(name)
            if name == "max_completion_tokens":
                sent["max_tokens"] = value
        host.busy, host.sent = host.busy + 1, host.sent + 1
        begun = time.monotonic()
        entry: dict[str, Any] = {
            "id": question,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "address": host.address,
            "status": None,
            "result": "cancelled",
        } | ({"odds": True} if "logprobs" in sent else {})
        try:
            async with asyncio.timeout(self.timeout):
                raw = await host.client.chat.completions.with_raw_response.create(**sent)
            entry["status"] = raw.http_response.status_code
            return self._read(host, sent, raw.http_response, entry)
        except openai.APIStatusError as error:
            entry["status"] = error.status_code
            given = error.body, error.response.headers, error.message
            refusal = parse_rejection(error.status_code, *given, self.cleaner.line)
            return self._rejected(host, sent, refusal, type(error).__name__, entry), None
        except (TimeoutError, openai.APIConnectionError, BodyError) as error:
            return self._broken(error, entry), None
        except Exception as error:
            entry |= {"result": type(error).__name__, "detail": self.cleaner.line(first_line(error))}
            raise
        finally:
            host.busy -= 1
            self.log(entry | {"seconds": round(time.monotonic() - begun, 3)})

    def _read(
        self, host: Host, sent: Mapping[str, Any], response: Any, entry: dict[str, Any]
    ) -> tuple[Outcome, int | None]:
        """Returns the outcome of a response with status 200, usually a completion."""
        clean = self.cleaner.line
        try:
            body = parsed(response.content, response.charset_encoding)
            if isinstance(body, Mapping) and body.get("error") and not body.get("choices"):
                return self._error_inside(host, sent, body["error"], entry), None
            completion = read_completion(body, self.max_count, self.thinking)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            said = f"{type(error).__name__}: {clean(first_line(error))}"
            entry |= {"result": "malformed", "detail": f"{said}; the body: {clean(response.text)}"}
            return TransientFailure(f"the reply is not a chat completion ({said})"), None
        return self._answer(host, sent, completion, entry), sum(count or 0 for count in completion.counts.values())

    def _answer(self, host: Host, sent: Mapping[str, Any], completion: Completion, entry: dict[str, Any]) -> Outcome:
        """Returns the response, unless it is longer than requested, or lacks log-probabilities that were requested."""
        clean = self.cleaner.line
        reason = clean(completion.finish_reason)
        entry |= {"model": clean(completion.model), **completion.counts, "result": reason}
        if completion.named != completion.finish_reason:
            entry["finish_reason"] = clean(completion.named)
        if completion.impossible:
            entry["impossible"] = {name: clean(said) for name, said in completion.impossible.items()}
        count = completion.counts["completion_tokens"] or 0
        if count > sent.get("max_completion_tokens", count):
            entry["result"] = "too long"
            return RejectedParameter("max_completion_tokens", "it is ignored")
        if "logprobs" in sent and not completion.first:
            entry["result"] = "no logprobs"
            lacks = "returns no log-probabilities (logprobs), which the odds need"
            if host.answered or reason in ("refusal", "content_filter"):  # it has some in other responses
                return Unanswered(f"{entry['id']}: {host.address} {lacks}")
            return FatalRejection(f"model.odds: {host.address} {lacks}; omit it, or use another server")
        if completion.closing and not host.reported_marks:
            host.reported_marks = True
            say(
                f"{host.address}: responses begin inside the reasoning ({completion.closing} without an opening mark); "
                f"to count a response that ends there as unfinished, give vlm.thinking: ['', {completion.closing}]"
            )
        texts = self.cleaner.answer(completion.text), self.cleaner.answer(completion.reasoning)
        if "logprobs" in sent:
            return FirstToken(UnknownTokens(count), texts[0], reason, texts[1], first=completion.first)
        return Generation(UnknownTokens(count), texts[0], reason, texts[1])

    def _error_inside(self, host: Host, sent: Mapping[str, Any], error: object, entry: dict[str, Any]) -> Outcome:
        """Returns the outcome of an error object in a response with status 200, as if its code were the status."""
        code = error.get("code") if isinstance(error, Mapping) else None
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
        refusal = parse_rejection(status, error, {}, "an error that came with the status 200", self.cleaner.line)
        return self._rejected(host, sent, refusal, "error", entry)

    def _rejected(
        self, host: Host, sent: Mapping[str, Any], refusal: Rejection, kind: str, entry: dict[str, Any]
    ) -> Outcome:
        """Returns the outcome of a failure that the server reported."""
        entry |= {"result": self.cleaner.line(refusal.code or kind), "detail": refusal.message}
        if refusal.pause is not None:
            entry["retry_after"] = refusal.pause
        if refusal.location:
            entry["redirect"] = refusal.location
        outcome = outcome_of(refusal, entry["id"], host.address, sent, self.variable, self.has_key, host.answered > 0)
        if isinstance(outcome, Generation):
            entry["result"] = outcome.finish_reason
        return outcome

    def _broken(self, error: Exception, entry: dict[str, Any]) -> Outcome:
        """Returns the outcome of a request without a complete response."""
        cause = error.__cause__ or error
        kind = type(cause).__name__
        entry["detail"] = "" if isinstance(error, TimeoutError) else self.cleaner.line(cause)
        if isinstance(cause, BodyTooLargeError):
            entry["result"] = "too large"
            return Unanswered(f"{entry['id']}: the response has {cause}, the limit of vlm.max_body; it is discarded")
        if isinstance(cause, BodyError):
            entry["result"] = "malformed"
            return TransientFailure(self.cleaner.line(cause))
        connecting = kind in ("ConnectError", "ConnectTimeout")
        late = isinstance(error, TimeoutError | openai.APITimeoutError) and not connecting
        entry["result"] = "timeout" if late else kind
        reason = f"no response within vlm.timeout ({self.timeout:g} s)" if late else f"{kind}: connection failed"
        return TransientFailure(reason, by_server=connecting)
