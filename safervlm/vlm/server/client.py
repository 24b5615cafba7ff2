"""VLMs behind an OpenAI-compatible chat completions API: OpenAI, vLLM, SGLang, ``transformers serve``.

Requests are sent concurrently. Transient failures are retried with back-off. A server that is unreachable or requests a
pause (429, 502, 503) backs off, and other servers take over. A question whose response was broken (time-out, truncated
body, 500) is asked again, by another server if there is one. Nothing else is ever sent twice. A refusal or a content
filter is a response to be measured, not an error. Any failure of one question is recorded as its failure.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safervlm.addresses import SECRET_VARIABLES
from safervlm.errors import ArgumentError, RecordError, first_line
from safervlm.hashing import seed_for
from safervlm.io.images import ImageSettings
from safervlm.io.signals import asked_to_end
from safervlm.io.tables import say
from safervlm.ranges import in_range
from safervlm.records import Question
from safervlm.vlm.base import VLM, Answer, Generation, Unanswered, WordProbabilities
from safervlm.vlm.lora import Adapter
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.batch import ServerBatch, ServerCollator, blank_url
from safervlm.vlm.server.body import checked_body
from safervlm.vlm.server.bounds import Bounds
from safervlm.vlm.server.first_token import SETTINGS_OF_ODDS, words_of
from safervlm.vlm.server.host import Host, hosts_at
from safervlm.vlm.server.outcomes import FatalRejection, RejectedParameter, UnusableServer, seconds_to_wait
from safervlm.vlm.server.pool import Pool
from safervlm.vlm.thinking import Setting, for_server

if TYPE_CHECKING:
    from safervlm.vlm.server.request import Requests

__all__ = ["Server", "ServerBatch", "seconds_to_wait"]

Settings = Callable[[Question], Mapping[str, Any]]  # parameters of the request for a question

POLL = 0.25  # seconds between two checks whether the command is asked to end
ENDING = "the command is asked to end; what is answered is kept, the same command resumes"


class Server(VLM):
    """A model behind one or more servers with OpenAI's chat completions API; needs the extra ``api``.

    Proxies of the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY) are used, except for addresses of this machine.
    Redirects are never followed.

    Args:
        model: Name of the model on the servers.
        addresses: Base URLs of the servers, for example http://localhost:8000/v1. Several servers share the work, and
            one that fails permanently is excluded. A user name, password, query or fragment is rejected.
        api_key_variable: Environment variable with the API key, which is sent to each of the addresses. A local server
            needs none.
        system: System prompt of the conversation; empty for none.
        blank: Send a blank white image with a question that has no image. If false, such a question is sent as text
            only.
        concurrency: Maximum number of concurrent requests over all servers, per process. A batch has at most
            data.batch_size of them.
        timeout: Maximum time for one request, in seconds, from sending it to the last byte of the response.
        max_retries: Maximum number of retries of a question whose response was broken (about bounds.pauses times as
            many if the server requests pauses while it answers others). A server is excluded after more than this many
            consecutive failures.
        max_requests: Maximum number of requests per command and process, including retries. None for no limit.
        max_tokens: Maximum number of prompt and response tokens per command and process, as counted by the server.
            Requests in progress are completed when it is reached. None for no limit.
        dry_run: Print an estimate of the work, and stop before the first request.
        max_wait: Longest pause that a server may request (Retry-After), in seconds. A server that requests more is
            excluded.
        question_timeout: Maximum time for one question, in seconds, including retries and pauses; then it counts as
            unanswered.
        max_body: Maximum size of a response body, in bytes, compressed and decompressed. A larger one is discarded, and
            its question counts as unanswered.
        max_count: Largest plausible number of tokens of a prompt or response. A larger or impossible number is recorded
            as 0 tokens, and unchanged in the request log.
        images: How images are decoded, and the size limits above which they are rejected.
        bounds: Back-off times and failure limits.
        thinking: The marks around reasoning inside a response, ``[<think>, </think>]``. ``detected`` finds the common
            ones; ``none`` separates nothing. An empty opening mark means that each response begins
            inside the reasoning. Reasoning that the server returns separately is always separate.
        extra_body: Further fields of each request, for example ``{chat_template_kwargs: {enable_thinking: false}}``.

    Attributes:
        on_attempt: Callback that receives the log entry of each request.
        requests: Number of requests so far.
        tokens: Number of tokens so far, as counted by the servers.

    Raises:
        ArgumentError: A value is out of range, can't be sent, or is not a base URL.
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
        max_wait: float = 600.0,
        question_timeout: float = 3600.0,
        max_body: int = 16 * 2**20,
        max_count: int = 10_000_000,
        images: ImageSettings = ImageSettings(),  # noqa: B008 (frozen)
        bounds: Bounds = Bounds(),  # noqa: B008 (frozen)
        thinking: Setting = "detected",
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.images, self.bounds = images, bounds
        self.thinking_setting, self.thinking = thinking, for_server(thinking)
        self.extra_body = checked_body(extra_body)
        self.hosts = hosts_at(addresses)
        for name, text in (("model", model), ("system", system)):
            if text.encode("utf-8", "ignore").decode() != text:
                raise ArgumentError(f"vlm.{name}: half of a surrogate pair can't be sent, got {ascii(text)[:80]}")
        if not model.strip():
            raise ArgumentError(f"vlm.model: the name that the servers know the model by, got {model!r}")
        counts = {"max_requests": max_requests, "max_tokens": max_tokens, "max_body": max_body, "max_count": max_count}
        in_range("vlm", least=1, concurrency=concurrency, **counts)
        in_range("vlm", least=0, max_retries=max_retries)
        in_range("vlm", above=0, timeout=timeout, max_wait=max_wait, question_timeout=question_timeout)
        self.name, self.system, self.blank, self.api_key_variable = model, system, blank, api_key_variable
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.max_requests, self.max_tokens, self.dry_run = max_requests, max_tokens, dry_run
        self.max_wait, self.question_timeout = max_wait, question_timeout
        self.max_body, self.max_count = max_body, max_count
        self.on_attempt: Callable[[dict[str, Any]], None] = lambda attempt: None
        self.requests = self.tokens = 0
        self.pool = Pool(self.hosts, max_retries, self._back_off)
        # Failures of the odds, and parameters that a server rejects for them, don't concern the responses.
        self.pool_of_odds = Pool(hosts_at(addresses), max_retries, self._back_off)
        self._untold = False  # whether on_attempt failed
        self._jitter = random.Random()

    @property
    def halted(self) -> str | None:
        """Reason why no more requests are sent; None while requests are sent."""
        return self.pool.halted

    @property
    def collator(self) -> ServerCollator:
        """Collator that encodes each image as a data URL."""
        return ServerCollator(self.images)

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine a response; the addresses are not among them."""
        kind = type(self)
        described: dict[str, Any] = {
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "model": self.name,
            "system": self.system,
        }
        described |= {} if self.blank else {"blank": False}
        described |= {} if self.thinking_setting == "detected" else {"thinking": self.thinking_setting}
        described |= {"extra_body": self.extra_body} if self.extra_body else {}
        return described | self.images.describe()

    def load(self) -> None:
        """Checks that the openai package is installed and the API key is valid text; no request is sent.

        Raises:
            ArgumentError: The package is missing, or the key has characters that no key has.
        """
        try:
            import openai  # noqa: F401
        except ImportError:
            raise ArgumentError("vlm: Server needs the package openai: pip install 'safervlm[api]'") from None
        self._key()

    def estimate(self, questions: Sequence[Question], max_new_tokens: int) -> str:
        """Estimates the work for a list of questions; no request is sent and no image is decoded.

        Args:
            questions: All questions.
            max_new_tokens: Maximum number of tokens of a response.

        Returns:
            One line of text.
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
            f"{len(questions)} questions{about} to {self.name}: about {text} tokens of text (4 characters per token),"
            f"{sent} at most {len(questions) * max_new_tokens} tokens of responses; retries come on top"
        )

    def generate(self, batch: ServerBatch, sampling: Sampling, seed: int, adapter: Adapter = "policy") -> list[Answer]:
        """Sends the questions of a batch concurrently, and returns the responses.

        When the command is asked to end (:func:`safervlm.io.signals.asked_to_end`), requests in progress are cancelled
        within a second.

        Args:
            batch: The questions.
            sampling: Decoding settings, sent with each request.
            seed: Each request's seed is derived from (seed, record id). Whether it makes responses reproducible depends
                on the server.
            adapter: Ignored, because a server has one model.

        Raises:
            ArgumentError: No more requests can be sent, or ``dry_run`` is set.
        """
        if self.dry_run:
            raise ArgumentError(
                "vlm.dry_run: no request is sent; safervlm predict prints the estimate; omit it to send the questions"
            )
        self.load()
        if self.halted is not None:
            raise ArgumentError(self.halted)

        def settings(question: Question) -> dict[str, Any]:
            return {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_completion_tokens": sampling.max_new_tokens,
                "seed": seed_for(seed, question.id) % 2**31,
            }

        answers = asyncio.run(self._answer_all(batch, self.pool, settings))
        none = not any(isinstance(answer, Generation) for answer in answers)
        if self.halted is not None and none and not asked_to_end():
            raise ArgumentError(self.halted)
        return answers

    def first_words(self, batch: ServerBatch) -> list[WordProbabilities | Unanswered]:
        """Requests the most probable first tokens of each answer, and sums those that are a word.

        A request generates one token. A server without log-probabilities is not asked again by this command.

        Args:
            batch: The questions.

        Returns:
            For each question, in order, the log-probabilities of its words, or the reason why there are none.
        """
        if (halted := self.pool_of_odds.halted) is not None:
            return [Unanswered(f"{question.id}: not asked; {halted}") for question in batch.questions]
        answers = asyncio.run(self._answer_all(batch, self.pool_of_odds, lambda question: SETTINGS_OF_ODDS))
        return [words_of(question, answer) for question, answer in zip(batch.questions, answers, strict=True)]

    async def _answer_all(self, batch: ServerBatch, pool: Pool, settings: Settings) -> list[Answer]:
        """Returns for each question its response, or the reason why there is none."""
        from safervlm.vlm.server.request import Requests

        slots = asyncio.Semaphore(self.concurrency)
        pool.begin()
        requests = Requests(
            pool.hosts,
            self._key(),
            self.api_key_variable,
            self.timeout,
            self.bounds.connect,
            self.max_body,
            self.max_count,
            self.concurrency,
            self._log,
            self.thinking,
        )

        async def answer(question: Question, image: str) -> Answer:
            async with slots:
                return await self._answer(requests, pool, question, image, settings(question))

        try:
            pairs = list(zip(batch.questions, batch.image_rows, strict=True))
            tasks = [asyncio.create_task(answer(question, batch.images[row])) for question, row in pairs]
            watch = asyncio.create_task(_cancel_when_asked_to_end(tasks))
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            watch.cancel()
        finally:
            pool.end()
            await requests.close()
        return [
            outcome if isinstance(outcome, Answer) else Unanswered(f"{question.id}: not answered; {ENDING}")
            for (question, _), outcome in zip(pairs, outcomes, strict=True)
        ]

    async def _answer(
        self, requests: "Requests", pool: Pool, question: Question, image: str, settings: Mapping[str, Any]
    ) -> Answer:
        """Returns the response to a question, or the reason why there is none, for any kind of failure."""
        try:
            request = {"model": self.name, "messages": self._messages(question, image), **settings}
            request |= {"extra_body": self.extra_body} if self.extra_body else {}
            async with asyncio.timeout(self.question_timeout):
                generation = await self._ask(requests, pool, question.id, request)
        except RecordError as error:
            reason = str(error)
        except TimeoutError:
            reason = f"{question.id}: no response within vlm.question_timeout ({self.question_timeout:g} s)"
        except Exception as error:
            reason = f"{question.id}: {type(error).__name__}: {requests.cleaner.line(first_line(error))}"
        else:
            pool.unanswered_in_a_row = 0
            return generation
        if pool.halted is None:
            pool.unanswered_in_a_row += 1
            if pool.unanswered_in_a_row >= self.bounds.failures_in_a_row:
                pool.stop(f"vlm: {pool.unanswered_in_a_row} questions in a row got no response, the last: {reason}")
        return Unanswered(reason)

    def _messages(self, question: Question, image: str) -> list[dict[str, Any]]:
        """Returns the conversation up to the response.

        Raises:
            RecordError: The question can't be encoded as UTF-8.
        """
        try:
            question.prompt.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                f"{question.id}: character {error.start + 1} of the question is half of a surrogate pair, which can't "
                "be sent; correct the question"
            ) from None
        system = [{"role": "system", "content": self.system}] if self.system else []
        if question.image_path is None and not self.blank:
            return [*system, {"role": "user", "content": question.prompt}]
        shown = {"type": "image_url", "image_url": {"url": image}}
        return [*system, {"role": "user", "content": [shown, {"type": "text", "text": question.prompt}]}]

    async def _ask(self, requests: "Requests", pool: Pool, question: str, request: Mapping[str, Any]) -> Generation:
        """Sends one question, with as many retries as are allowed.

        Raises:
            RecordError: The retries are exhausted, or no more requests can be sent.
        """
        tries, pauses, answered, last = 0, 0, pool.answered, None
        while True:
            host = await self._free_host(pool, last, question)
            begun = time.monotonic()
            outcome, tokens = await requests.send(host, question, request)
            if tokens is not None:
                self.tokens += tokens
                if self.max_tokens is not None and not tokens:
                    pool.stop(f"vlm.max_tokens: {host.address} doesn't count tokens; omit it, or use vlm.max_requests")
            match outcome:
                case Generation():
                    host.succeed()
                    return outcome
                case Unanswered():
                    raise RecordError(outcome.reason)
                case FatalRejection():
                    raise pool.stop(outcome.reason)
                case RejectedParameter():
                    pool.omit_parameter(host, outcome)
                    continue
                case UnusableServer():
                    pool.exclude(host, outcome.reason)
                    continue
            last = host
            if outcome.pause is not None and outcome.pause > self.max_wait:
                said = f"it asks for a pause of {outcome.pause:.0f} s, more than vlm.max_wait, {self.max_wait:g} s"
                pool.exclude(host, f"{said}: {outcome.reason}")
                continue
            unanswered = RecordError(
                f"{question}: no response after {tries + pauses + 1} requests, the last to {host.address}: "
                f"{outcome.reason}"
            )
            if outcome.by_server:
                pauses += pool.answered > answered  # a server has answered other questions meanwhile
                answered = pool.answered
                most = self.bounds.pauses * (self.max_retries + 1)
                if not pool.suspend(host, question, outcome, begun) or pauses > most:
                    raise unanswered
                continue
            tries += 1
            if tries > self.max_retries:
                raise unanswered
            await pool.wait(max(self._back_off(tries), outcome.pause or 0.0))

    async def _free_host(self, pool: Pool, last: Host | None, question: str) -> Host:
        """Waits for a server that is not backing off, and counts the request to it.

        Nothing is awaited between the check of the caps and the count, so the caps are exact.

        Raises:
            RecordError: No more requests can be sent.
        """
        while True:
            for name, used, cap, what in (
                ("max_requests", self.requests, self.max_requests, "requests are sent"),
                ("max_tokens", self.tokens, self.max_tokens, "tokens are used"),
            ):
                if cap is not None and used >= cap:
                    pool.stop(
                        f"vlm.{name}: {used} {what}, the cap of one command is {cap}; what is answered is kept, the "
                        "same command resumes (with a new count)"
                    )
            if pool.halted is not None:
                raise RecordError(f"{question}: not asked; {pool.halted}")
            found = pool.ready(last)
            if isinstance(found, Host):
                self.requests += 1
                return found
            await pool.wait(found)

    def _log(self, attempt: dict[str, Any]) -> None:
        """Calls :attr:`on_attempt`; an error in it doesn't lose the response."""
        try:
            self.on_attempt(attempt)
        except Exception as error:
            if not self._untold:
                say(f"the log of attempts is incomplete: {type(error).__name__}: {first_line(error)}")
            self._untold = True

    def _back_off(self, failures: int) -> float:
        """Returns the back-off time in seconds: exponential in the number of failures, with random jitter."""
        seconds = min(self.bounds.first_wait * 2.0 ** min(failures - 1, 60), self.bounds.longest_wait)
        return seconds * self._jitter.uniform(0.5, 1)

    def _key(self) -> str | None:
        """Returns the API key; it is read from the environment on each use, and never stored or shown."""
        SECRET_VARIABLES.add(self.api_key_variable)
        key = os.environ.get(self.api_key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ArgumentError(
                f"vlm.api_key_variable: the environment variable {self.api_key_variable} contains line breaks or other "
                "characters that no key has"
            )
        return key or None


async def _cancel_when_asked_to_end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    while not asked_to_end():
        await asyncio.sleep(POLL)
    for task in tasks:
        task.cancel()
