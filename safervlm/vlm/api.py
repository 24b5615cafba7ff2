"""Any server that speaks OpenAI's chat completions: models of that API, vLLM, SGLang, ``transformers serve``.

Requests go out side by side. What may pass is tried again, with back-off: a server that can't be reached, or asks for
a pause (429, 502, 503), rests, and other servers take over; a question whose answer came broken (a time-out, a cut
body, 500) is asked again, elsewhere if there is an elsewhere. Nothing else is ever sent twice. What the server declines
to say, a refusal or a content filter, is an answer to be measured, not an error.
"""

import asyncio
import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safervlm.errors import ArgumentError
from safervlm.images import ImageSettings
from safervlm.records import Question, seed_for
from safervlm.vlm.base import VLM, Generation, Unanswered
from safervlm.vlm.lora import Adapter
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server_batch import ServerBatch, ServerCollator, blank_url

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the first try after a failure, and before any later one
CONNECT = 10.0  # seconds that a server may take to be reached
IN_A_ROW = 20  # questions without an answer, none in between: the fault isn't theirs
UNNAMED = -1  # a token of an answer: a server says how many there are, not which

FILTERS = {"content_filter", "content_policy_violation", "image_content_policy_violation", "invalid_prompt"}
PAUSE = {429, 502, 503}
AGAIN = {408, 409}
OF_THE_QUESTION = {400, 413, 415, 422}
SETTINGS = {
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "max_completion_tokens": "sampling.max_new_tokens",
    "max_tokens": "sampling.max_new_tokens",
    "seed": "seed_everything",
}
UNKNOWN = re.compile(r"not? (support|permit|allow)|unsupported|unrecogni|unknown|unexpected|extra (input|field)", re.I)


class Passing(Exception):  # noqa: N818
    """What went wrong may pass.

    Attributes:
        reason: in one line.
        by_server: whether it would have befallen any question.
        pause: seconds that the server asks for; None if it doesn't say.
        mended: whether it won't come again, and the next try counts as the first.
    """

    def __init__(self, reason: str, by_server: bool = False, pause: float | None = None, mended: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.by_server, self.pause, self.mended = reason, by_server, pause, mended


@dataclass
class Host:
    """One of the servers, and how it does.

    Attributes:
        address: its base URL.
        client: speaks to it; made anew for each batch.
        left_out: parameters that it refused, to be sent under another name or not at all.
        busy: requests on their way.
        sent: requests so far.
        failures: in a row, counted once a rest.
        rested: when the last rest began, and
        ready: when it ends, by the monotonic clock.
        out: left out for good.
    """

    address: str
    client: Any = None
    left_out: set[str] = field(default_factory=set)
    busy: int = 0
    sent: int = 0
    failures: int = 0
    rested: float = -math.inf
    ready: float = -math.inf
    out: bool = False


class Server(VLM):
    """A model behind one or several servers with OpenAI's chat completions; needs the extra ``api``.

    Args:
        model: the name that the servers know it by.
        addresses: base URLs of the servers, for example http://localhost:8000/v1; several share the work, and one that
            dies is left out.
        api_key_variable: the environment variable that holds the key, which is sent to each of the addresses; a server
            of your own needs none.
        system: the conversation's system prompt; empty for none.
        blank: shows a blank white image with a question that has none; without, such a question is text alone.
        concurrency: requests on their way at the same time, over all servers, of each process; a batch holds no more
            than data.batch_size of them.
        timeout: seconds that a whole answer may take.
        max_retries: how often a question is asked again whose answer came broken, and how often in a row a server may
            fail before it is left out.
        max_requests: a cap on the requests that one command sends, retries included, of each process; none for no cap.
        max_tokens: a cap on the tokens of prompts and answers that one command pays for, of each process, as the server
            counts them; what is on its way when it is reached still comes. None for no cap.
        dry_run: says what there is to ask, and ends before the first request.
        images: how images are decoded, and which are too large.
    """

    def __init__(
        self,
        model: str,
        addresses: Sequence[str],
        api_key_variable: str = "OPENAI_API_KEY",
        system: str = "",
        blank: bool = True,
        concurrency: int = 16,
        timeout: float = 300.0,
        max_retries: int = 6,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        dry_run: bool = False,
        images: ImageSettings = ImageSettings(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if not addresses or isinstance(addresses, str):
            raise ArgumentError(f"vlm.addresses: a list of base URLs, got {addresses!r}")
        for address in addresses:
            url = urlsplit(address)
            if "@" in address or url.query:
                raise ArgumentError(
                    f"vlm.addresses: the one at {url.hostname} holds more than a place; a key is read from the "
                    "environment variable vlm.api_key_variable"
                )
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ArgumentError(f"vlm.addresses: a base URL such as http://localhost:8000/v1, got {address!r}")
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("max_retries", max_retries, 0),
            ("max_requests", max_requests, 1),
            ("max_tokens", max_tokens, 1),
        ):
            if value is not None and value < least:
                raise ArgumentError(f"vlm.{name}: at least {least}, got {value}")
        if not timeout > 0:
            raise ArgumentError(f"vlm.timeout: more than 0 seconds, got {timeout}")
        self.name, self.system, self.blank, self.api_key_variable = model, system, blank, api_key_variable
        self.hosts = [Host(address.rstrip("/")) for address in addresses]
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.max_requests, self.max_tokens, self.dry_run = max_requests, max_tokens, dry_run
        self.images = images
        self.on_attempt: Callable[[dict[str, Any]], None] = lambda attempt: None
        self.requests = self.tokens = self.unanswered_in_a_row = 0
        self.halted: str | None = None  # why nothing more is sent
        self._halt: asyncio.Event | None = None  # of the batch at work: wakes those that wait
        self._jitter = random.Random()

    @property
    def collator(self) -> ServerCollator:
        """Makes a data URL of each image."""
        return ServerCollator(self.images)

    def describe(self) -> dict[str, Any]:
        """What decides an answer; where the model is served doesn't."""
        kind = type(self)
        described = {"class": f"{kind.__module__}.{kind.__qualname__}", "model": self.name, "system": self.system}
        return (described if self.blank else described | {"blank": False}) | self.images.describe()

    def load(self) -> None:
        """Looks at what is needed here; no server is asked."""
        try:
            import openai  # noqa: F401
        except ImportError:
            raise ArgumentError("vlm: Server needs the package openai: pip install 'safervlm[api]'") from None
        self._key()

    def estimate(self, questions: Sequence[Question], max_new_tokens: int) -> str:
        """What asking would take; nothing is sent, and no image is read.

        Args:
            questions: all of them.
            max_new_tokens: of an answer.
        """
        sizes: dict[str | None, int] = {None: len(blank_url())}
        for path in {question.image_path for question in questions} - {None}:
            file = Path(str(path))
            sizes[path] = 4 * file.stat().st_size // 3 if file.is_file() else 0
        shown = [question.image_path for question in questions if self.blank or question.image_path is not None]
        text = sum(len(question.prompt) + len(self.system) for question in questions) // 4
        about, sent = "", ""
        if shown:
            about = f" about {len(set(shown))} different images"
            megabytes = sum(sizes[path] for path in shown) / 1e6
            sent = f" {megabytes:.1f} MB of images (a server has its own way to count them as tokens),"
        return (
            f"{len(questions)} questions{about} to {self.name}: about {text} tokens of text (4 characters a token),"
            f"{sent} at most {len(questions) * max_new_tokens} tokens of answers; retries come on top"
        )

    def generate(
        self, batch: ServerBatch, sampling: Sampling, seed: int, adapter: Adapter = "policy"
    ) -> list[Generation]:
        """Asks the questions of a batch, side by side.

        Args:
            batch: the questions.
            sampling: how to draw.
            seed: each request's is drawn from (seed, record id); whether the server keeps to it is its affair.
            adapter: all alike: a server has one model.

        Raises:
            Unanswered: some questions got no answer; it holds the answers of the others.
            ArgumentError: nothing can be asked any more.
        """
        if self.dry_run:
            raise ArgumentError(
                "vlm.dry_run: nothing is asked; safervlm predict prints the estimate, leave it out to ask"
            )
        self.load()
        if self.halted is not None:
            raise ArgumentError(self.halted)
        answers = asyncio.run(self._answer_all(batch, sampling, seed))
        good = [answer for answer in answers if isinstance(answer, Generation)]
        if self.halted is not None and not good:
            raise ArgumentError(self.halted)
        if len(good) < len(answers):
            raise Unanswered(self.halted or next(each for each in answers if isinstance(each, str)), answers)
        return good

    async def _answer_all(self, batch: ServerBatch, sampling: Sampling, seed: int) -> list[Generation | str]:
        """To each question its answer, or why there is none."""
        import openai

        self._halt = asyncio.Event()
        slots = asyncio.Semaphore(self.concurrency)

        async def answer(question: Question, image: str) -> Generation | str:
            request = {
                "model": self.name,
                "messages": self._messages(question, image),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_completion_tokens": sampling.max_new_tokens,
                "seed": seed_for(seed, question.id) % 2**31,
            }
            async with slots:
                try:
                    generation = await self._ask(question, request)
                except Unanswered as error:
                    if self.halted is None:
                        self.unanswered_in_a_row += 1
                        if self.unanswered_in_a_row >= IN_A_ROW:
                            self._stop(f"vlm: {IN_A_ROW} questions in a row got no answer, the last: {error}")
                    return str(error)
                self.unanswered_in_a_row = 0
                return generation

        timeout = openai.Timeout(self.timeout, connect=min(CONNECT, self.timeout))
        for host in self.hosts:
            host.client = openai.AsyncOpenAI(
                base_url=host.address, api_key=self._key() or "none", timeout=timeout, max_retries=0
            )
        try:
            pairs = zip(batch.questions, batch.image_rows, strict=True)
            return await asyncio.gather(*(answer(question, batch.images[row]) for question, row in pairs))
        finally:
            for host in self.hosts:
                await host.client.close()
                host.client, host.busy = None, 0  # the client holds the key

    def _messages(self, question: Question, image: str) -> list[dict[str, Any]]:
        """The conversation up to the answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        if question.image_path is None and not self.blank:
            return [*system, {"role": "user", "content": question.prompt}]
        shown = {"type": "image_url", "image_url": {"url": image}}
        return [*system, {"role": "user", "content": [shown, {"type": "text", "text": question.prompt}]}]

    async def _ask(self, question: Question, request: Mapping[str, Any]) -> Generation:
        """One question, as often as it takes.

        Raises:
            Unanswered: it was asked often enough, or nothing can be asked any more.
        """
        tries, last = 0, None
        while True:
            host = await self._free_host(last, question)
            begun = time.monotonic()
            try:
                generation = await self._attempt(host, question, request)
            except Passing as failure:
                if failure.mended:
                    continue
                last = host
                if failure.by_server:
                    self._rest(host, failure, begun)
                    continue
                tries += 1
                if tries > self.max_retries:
                    raise Unanswered(
                        f"{question.id}: no answer after {tries} requests, the last to {host.address}: {failure.reason}"
                    ) from None
                await self._wait(max(self._back_off(tries), failure.pause or 0.0))
            else:
                host.failures = 0
                return generation

    async def _free_host(self, last: Host | None, question: Question) -> Host:
        """The least busy server that isn't resting; rather another one than the last."""
        while True:
            if self.halted is None and self.max_requests is not None and self.requests >= self.max_requests:
                self._stop(
                    f"vlm.max_requests: {self.requests} requests are sent, the cap of one command; what is answered "
                    "is kept, the same command goes on (with a new count)"
                )
            if self.halted is None and self.max_tokens is not None and self.tokens >= self.max_tokens:
                self._stop(
                    f"vlm.max_tokens: {self.tokens} tokens are used, the cap of one command is {self.max_tokens}; "
                    "what is answered is kept, the same command goes on (with a new count)"
                )
            if self.halted is not None:
                raise Unanswered(f"{question.id}: not asked; {self.halted}")
            now = time.monotonic()
            there = [host for host in self.hosts if not host.out]
            ready = [host for host in there if host.ready <= now]
            if ready:
                return min(ready, key=lambda host: (host is last, host.busy, host.sent))
            # A little apart, so that a server isn't met by all at once.
            await self._wait(min(host.ready for host in there) - now + self._jitter.uniform(0, 0.1))

    async def _attempt(self, host: Host, question: Question, request: Mapping[str, Any]) -> Generation:
        """One request, whose history is told to :attr:`on_attempt`.

        Raises:
            Passing: it may be worth another try.
            Unanswered: it isn't.
        """
        import openai

        sent = dict(request)
        for name in host.left_out:
            value = sent.pop(name)
            if name == "max_completion_tokens":
                sent["max_tokens"] = value
        self.requests += 1
        host.busy, host.sent = host.busy + 1, host.sent + 1
        begun = time.monotonic()
        told: dict[str, Any] = {
            "id": question.id,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "address": host.address,
            "status": None,
        }
        outcome: Generation | Passing | Unanswered
        try:
            async with asyncio.timeout(self.timeout):
                raw = await host.client.chat.completions.with_raw_response.create(**sent)
            told["status"] = raw.http_response.status_code
            outcome = self._read(host, sent, raw.http_response.text, told)
        except openai.APIStatusError as error:
            told["status"] = error.status_code
            outcome = self._refused(host, question, sent, error, told)
        except (TimeoutError, openai.APIConnectionError) as error:
            kind = type(error.__cause__ or error).__name__
            connecting = kind in ("ConnectError", "ConnectTimeout")
            late = isinstance(error, TimeoutError | openai.APITimeoutError) and not connecting
            reason = f"no answer within vlm.timeout ({self.timeout:g} s)" if late else f"{kind}: connection failed"
            told["detail"] = self._clean(str(error.__cause__ or ""))
            outcome = Passing(reason, by_server=connecting)
            told["result"] = "timeout" if late else kind
        except asyncio.CancelledError:
            self.on_attempt(told | {"result": "cancelled", "seconds": round(time.monotonic() - begun, 3)})
            raise
        finally:
            host.busy -= 1
        if isinstance(outcome, Generation):
            told["result"] = outcome.finish_reason
        self.on_attempt(told | {"seconds": round(time.monotonic() - begun, 3)})
        if isinstance(outcome, Generation):
            return outcome
        raise outcome

    def _read(
        self, host: Host, sent: Mapping[str, Any], text: str, told: dict[str, Any]
    ) -> Generation | Passing | Unanswered:
        """The answer in a body that came with 200."""
        try:
            body = json.loads(text)
            usage = body.get("usage") or {}
            counts = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
            told |= {"model": self._clean(str(body.get("model"))), **counts}
            self.tokens += sum(counts.values())
            generation = read_choice(body["choices"][0], counts["completion_tokens"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            told["result"] = "malformed"
            told["detail"] = f"{type(error).__name__}: {self._clean(str(error))}; the body: {self._clean(text)}"
            return Passing(f"what came is no chat completion ({type(error).__name__}: {self._clean(str(error))})")
        if self.max_tokens is not None and not sum(counts.values()):
            self._stop(f"vlm.max_tokens: {host.address} doesn't count tokens; leave it out, or use vlm.max_requests")
        limit = sent.get("max_completion_tokens")
        if limit is not None and counts["completion_tokens"] > limit:
            told["result"] = "too long"
            return self._leave_out(host, "max_completion_tokens", "it is passed over")
        return generation

    def _refused(
        self, host: Host, question: Question, sent: Mapping[str, Any], error: Any, told: dict[str, Any]
    ) -> Generation | Passing | Unanswered:
        """What a status of 400 and above means."""
        status, body = error.status_code, error.body
        message = self._clean(str((isinstance(body, dict) and body.get("message")) or error.message))
        told |= {"result": self._clean(error.code or type(error).__name__), "detail": message}
        pause = seconds_to_wait(error.response.headers.get("retry-after"))
        if pause is not None:
            told["retry_after"] = pause
        if status == 400 and FILTERS & {error.code, error.type}:
            return Generation([], "", "content_filter")
        if error.code == "insufficient_quota" or status == 402:
            return self._stop(f"vlm: {host.address}: the account is used up ({message}); the same command goes on")
        if status in PAUSE:
            return Passing(f"{status}: {message}", by_server=True, pause=pause)
        if status >= 500 or status in AGAIN:
            return Passing(f"{status}: {message}", pause=pause)
        if status == 401:
            known = "refuses the key in" if self._key() else "asks for a key, and there is none in"
            return self._stop(
                f"vlm.api_key_variable: {host.address} {known} the environment variable {self.api_key_variable} (401); "
                "export it, the same command goes on"
            )
        if status == 403:
            return self._stop(
                f"vlm.api_key_variable: {host.address} forbids it to the key in {self.api_key_variable} (403: "
                f"{message}); use one that may ask {self.name}"
            )
        if status == 404:
            return self._stop(
                f"vlm.model: {host.address} has no {self.name!r}, or isn't a base URL, which mostly ends in /v1 (404: "
                f"{message}); {host.address}/models lists what it has"
            )
        if status not in OF_THE_QUESTION:
            return self._stop(f"vlm.addresses: {host.address} refuses ({status}: {message}); is it a base URL?")
        named = str(error.param) if error.param in SETTINGS else None
        if UNKNOWN.search(said := str(body)):
            named = named or next((name for name in SETTINGS if name in sent and re.search(rf"\b{name}\b", said)), None)
            if named in ("max_completion_tokens", "seed") or (named is not None and sent.get(named) == 1):
                return self._leave_out(host, named, message)
        if named is not None:
            return self._stop(
                f"{SETTINGS[named]}: {host.address} doesn't take {sent.get(named)!r} as {named} for {self.name} "
                f"({message}); give another value (a model that reasons takes 1 for temperature and top_p)"
            )
        return Unanswered(f"{question.id}: {host.address} can't take it ({status}: {message})")

    def _leave_out(self, host: Host, name: str, message: str) -> Passing:
        """Sends a parameter no more, or under its old name."""
        instead = {"max_completion_tokens": "max_tokens is sent instead", "seed": "its answers can't be repeated"}
        if name not in host.left_out:
            host.left_out.add(name)
            print(f"{host.address} doesn't take {name} ({message}): {instead.get(name, 'it is 1 anyway')}")
        return Passing(f"{name} is not taken", mended=True)

    def _rest(self, host: Host, failure: Passing, begun: float) -> None:
        """Leaves a server alone for a while, or for good if it failed too often in a row."""
        now = time.monotonic()
        if begun < host.rested or host.out:
            return  # sent before the rest began: it is no news
        host.failures += 1
        host.rested = now
        pause = max(self._back_off(host.failures), failure.pause or 0.0)
        host.ready = max(host.ready, now + pause)
        if host.failures <= self.max_retries:
            if pause > LONGEST_WAIT:
                print(f"{host.address} asks for a pause of {pause:.0f} s ({failure.reason})")
            return
        host.out = True
        others = [other.address for other in self.hosts if not other.out]
        if others:
            print(f"{host.address} is left out ({failure.reason}); its questions go to {', '.join(others)}")
        else:
            self._stop(
                f"vlm.addresses: no server answers any more, the last was {host.address} ({failure.reason}); what is "
                "answered is kept, the same command goes on when one is up"
            )

    def _stop(self, reason: str) -> Unanswered:
        """Nothing more is sent; what is on its way may come."""
        self.halted = self.halted or reason
        if self._halt is not None:
            self._halt.set()
        return Unanswered(self.halted)

    async def _wait(self, seconds: float) -> None:
        """Sleeps, unless there is nothing to wait for any more."""
        assert self._halt is not None  # noqa: S101 (set before any question is asked; for the type checker)
        try:
            async with asyncio.timeout(seconds):
                await self._halt.wait()
        except TimeoutError:
            pass

    def _back_off(self, failures: int) -> float:
        """Seconds to wait after so many failures: twice as long each time, scattered."""
        return min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT) * self._jitter.uniform(0.5, 1)

    def _key(self) -> str | None:
        """The key; it is read where it is needed, and kept nowhere."""
        key = os.environ.get(self.api_key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ArgumentError(
                f"vlm.api_key_variable: the environment variable {self.api_key_variable} holds line breaks or other "
                "characters that no key has"
            )
        return key or None

    def _clean(self, message: str) -> str:
        """One short line of what a server says, which may repeat the image or the key."""
        if key := self._key():
            message = message.replace(key, "(key)")
        message = re.sub(r"data:[\w/.+-]*;base64,[\w+/=]*", "(image)", message)
        line = " ".join(message.split())
        return line if len(line) <= 300 else f"{line[:300]}..."


def read_choice(choice: Mapping[str, Any], tokens: int) -> Generation:
    """The answer in a chat completion's choice.

    Args:
        choice: as parsed.
        tokens: of the answer.

    Raises:
        ValueError: it holds no answer, or one that stopped for a reason that is none of ours.
    """
    message, reason = choice["message"], choice.get("finish_reason")
    content, refusal = message.get("content"), message.get("refusal")
    ids = [UNNAMED] * tokens
    if refusal:
        return Generation(ids, str(refusal).strip(), "refusal")
    if reason == "content_filter":
        return Generation(ids, str(content or "").strip(), "content_filter")
    if reason == "length":  # a model that reasons may not have come to say anything
        return Generation(ids, str(content or "").strip(), "length")
    if reason != "stop" or not isinstance(content, str):
        raise ValueError(f"finish_reason {reason!r} with a content of type {type(content).__name__}")
    return Generation(ids, content.strip(), "stop")


def seconds_to_wait(retry_after: str | None) -> float | None:
    """A Retry-After header: seconds, or a date."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
