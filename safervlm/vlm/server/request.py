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
from safervlm.vlm.server.outcomes import Hopeless, Outcome, Refused, TransientFailure, Untaken, meaning, refused
from safervlm.vlm.server.reading import Completion, Unnamed, parsed, read_completion
from safervlm.vlm.server.transport import BodyError, BodyTooLargeError, client_for
from safervlm.vlm.thinking import Thinking


class Requests:
    """Sends the requests of a batch. It holds the API key, and is discarded with the batch.

    Args:
        hosts: The servers; their HTTP clients are created here.
        key: API key; None for none.
        variable: Name of the environment variable of the key, for messages.
        timeout: Maximum time for a request, in seconds.
        connect: Maximum time to connect to a server, in seconds.
        max_body: Maximum size of a response body, in bytes.
        max_count: Largest plausible number of tokens.
        concurrency: Number of connections to keep alive.
        tell: Callback that receives the log entry of each request.
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
        tell: Callable[[dict[str, Any]], None],
        thinking: Thinking,
    ) -> None:
        self.hosts, self.has_key, self.variable, self.timeout = hosts, key is not None, variable, timeout
        self.max_count, self.tell, self.cleaner, self.thinking = max_count, tell, Cleaner(key), thinking
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
            client, host.client, host.busy = host.client, None, 0  # the client holds the key
            if client is not None:
                await client.close()

    async def send(self, host: Host, question: str, request: Mapping[str, Any]) -> tuple[Outcome, int | None]:
        """Sends one request, and reports its log entry to ``tell``.

        Args:
            host: The server.
            question: Id of the question.
            request: Parameters of the request.

        Returns:
            The outcome, and the number of prompt and response tokens; None if there is no completion.
        """
        sent = dict(request)
        for name in host.left_out:
            value = sent.pop(name)
            if name == "max_completion_tokens":
                sent["max_tokens"] = value
        host.busy, host.sent = host.busy + 1, host.sent + 1
        begun = time.monotonic()
        told: dict[str, Any] = {
            "id": question,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "address": host.address,
            "status": None,
            "result": "cancelled",
        } | ({"odds": True} if "logprobs" in sent else {})
        try:
            async with asyncio.timeout(self.timeout):
                raw = await host.client.chat.completions.with_raw_response.create(**sent)
            told["status"] = raw.http_response.status_code
            return self._read(host, sent, raw.http_response, told)
        except openai.APIStatusError as error:
            told["status"] = error.status_code
            given = error.body, error.response.headers, error.message
            refusal = refused(error.status_code, *given, self.cleaner.line)
            return self._refused(host, sent, refusal, type(error).__name__, told), None
        except (TimeoutError, openai.APIConnectionError, BodyError) as error:
            return self._broken(error, told), None
        except Exception as error:
            told |= {"result": type(error).__name__, "detail": self.cleaner.line(first_line(error))}
            raise
        finally:
            host.busy -= 1
            self.tell(told | {"seconds": round(time.monotonic() - begun, 3)})

    def _read(
        self, host: Host, sent: Mapping[str, Any], response: Any, told: dict[str, Any]
    ) -> tuple[Outcome, int | None]:
        """Returns the outcome of a response with status 200, usually a completion."""
        clean = self.cleaner.line
        try:
            body = parsed(response.content, response.charset_encoding)
            if isinstance(body, Mapping) and body.get("error") and not body.get("choices"):
                return self._error_inside(host, sent, body["error"], told), None
            completion = read_completion(body, self.max_count, self.thinking)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            said = f"{type(error).__name__}: {clean(first_line(error))}"
            told |= {"result": "malformed", "detail": f"{said}; the body: {clean(response.text)}"}
            return TransientFailure(f"what came is no chat completion ({said})"), None
        return self._answer(host, sent, completion, told), sum(count or 0 for count in completion.counts.values())

    def _answer(self, host: Host, sent: Mapping[str, Any], completion: Completion, told: dict[str, Any]) -> Outcome:
        """Returns the response, unless it is longer than requested, or lacks the log-probabilities that were."""
        clean = self.cleaner.line
        reason = clean(completion.finish_reason)
        told |= {"model": clean(completion.model), **completion.counts, "result": reason}
        if completion.named != completion.finish_reason:
            told["finish_reason"] = clean(completion.named)
        if completion.impossible:
            told["impossible"] = {name: clean(said) for name, said in completion.impossible.items()}
        count = completion.counts["completion_tokens"] or 0
        if count > sent.get("max_completion_tokens", count):
            told["result"] = "too long"
            return Untaken("max_completion_tokens", "it is passed over")
        if "logprobs" in sent and not completion.first:
            told["result"] = "no logprobs"
            lacks = "returns no log-probabilities (logprobs), which the odds need"
            if host.answered or reason in ("refusal", "content_filter"):  # it has some in other responses
                return Unanswered(f"{told['id']}: {host.address} {lacks}")
            return Hopeless(f"model.odds: {host.address} {lacks}; omit it, or use another server")
        if completion.closing and not host.reported_marks:
            host.reported_marks = True
            say(
                f"{host.address}: responses begin inside the reasoning ({completion.closing} without an opening mark); "
                f"to count a response that ends there as unfinished, give vlm.thinking: ['', {completion.closing}]"
            )
        texts = self.cleaner.answer(completion.text), self.cleaner.answer(completion.reasoning)
        if "logprobs" in sent:
            return FirstToken(Unnamed(count), texts[0], reason, texts[1], first=completion.first)
        return Generation(Unnamed(count), texts[0], reason, texts[1])

    def _error_inside(self, host: Host, sent: Mapping[str, Any], error: object, told: dict[str, Any]) -> Outcome:
        """Returns the outcome of an error object in a response with status 200, as if its code were the status."""
        code = error.get("code") if isinstance(error, Mapping) else None
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
        refusal = refused(status, error, {}, "an error that came with the status 200", self.cleaner.line)
        return self._refused(host, sent, refusal, "error", told)

    def _refused(
        self, host: Host, sent: Mapping[str, Any], refusal: Refused, kind: str, told: dict[str, Any]
    ) -> Outcome:
        """Returns the outcome of a failure that the server reported."""
        told |= {"result": self.cleaner.line(refusal.code or kind), "detail": refusal.message}
        if refusal.pause is not None:
            told["retry_after"] = refusal.pause
        if refusal.location:
            told["redirect"] = refusal.location
        outcome = meaning(refusal, told["id"], host.address, sent, self.variable, self.has_key, host.answered > 0)
        if isinstance(outcome, Generation):
            told["result"] = outcome.finish_reason
        return outcome

    def _broken(self, error: Exception, told: dict[str, Any]) -> Outcome:
        """Returns the outcome of a request without a complete response."""
        cause = error.__cause__ or error
        kind = type(cause).__name__
        told["detail"] = "" if isinstance(error, TimeoutError) else self.cleaner.line(cause)
        if isinstance(cause, BodyTooLargeError):
            told["result"] = "too large"
            return Unanswered(f"{told['id']}: the response has {cause}, the limit of vlm.max_body; it is discarded")
        if isinstance(cause, BodyError):
            told["result"] = "malformed"
            return TransientFailure(self.cleaner.line(cause))
        connecting = kind in ("ConnectError", "ConnectTimeout")
        late = isinstance(error, TimeoutError | openai.APITimeoutError) and not connecting
        told["result"] = "timeout" if late else kind
        reason = f"no response within vlm.timeout ({self.timeout:g} s)" if late else f"{kind}: connection failed"
        return TransientFailure(reason, by_server=connecting)
