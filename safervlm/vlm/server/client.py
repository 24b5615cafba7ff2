"""Any server that speaks OpenAI's chat completions: models of that API, vLLM, SGLang, ``transformers serve``.

Requests are sent concurrently. What may pass is tried again, with back-off: a server that can't be reached, or asks for
a pause (429, 502, 503), rests, and other servers take over; a question whose answer came broken (a time-out, a cut
body, 500) is asked again, by another server if there is one. Nothing else is ever sent twice. A refusal or a content
filter is an answer to be measured, not an error. Whatever happens to one question is recorded as its failure.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safervlm.errors import ArgumentError, first_line
from safervlm.hashing import seed_for
from safervlm.io.images import ImageSettings
from safervlm.io.signals import asked_to_end
from safervlm.io.tables import say
from safervlm.ranges import in_range
from safervlm.records import Question
from safervlm.vlm.base import VLM, Generation, Unanswered
from safervlm.vlm.lora import Adapter
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.batch import ServerBatch, ServerCollator, blank_url
from safervlm.vlm.server.bounds import Bounds
from safervlm.vlm.server.host import Host, hosts_at
from safervlm.vlm.server.outcomes import Hopeless, Untaken, Useless, seconds_to_wait
from safervlm.vlm.server.pool import Pool

if TYPE_CHECKING:
    from safervlm.vlm.server.request import Requests

__all__ = ["Server", "ServerBatch", "Unanswered", "seconds_to_wait"]

POLL = 0.25  # seconds between two looks at whether the command is asked to end
ENDING = "the command is asked to end; what is answered is kept, the same command resumes"


class Server(VLM):
    """A model behind one or several servers with OpenAI's chat completions; needs the extra ``api``.

    A proxy of the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY) is used, but never for this machine's own addresses.
    Redirects are never followed.

    Args:
        model: the name that the servers know it by.
        addresses: base URLs of the servers, for example http://localhost:8000/v1; several share the work, and one that
            dies is left out. A user name, password, query or fragment is rejected.
        api_key_variable: the environment variable that holds the key, which is sent to each of the addresses; a server
            of your own needs none.
        system: the conversation's system prompt; empty for none.
        blank: shows a blank white image with a question that has none; without, such a question is text alone.
        concurrency: requests on their way at the same time, over all servers, of each process; a batch holds no more
            than data.batch_size of them.
        timeout: seconds that a whole answer may take, from the request to the last byte.
        max_retries: how often a question is asked again whose answer came broken (bounds.pauses times as often where
            the server asks for a pause while it answers others), and how often in a row a server may fail before it is
            left out.
        max_requests: a cap on the requests that one command sends, retries included, of each process; none for no cap.
        max_tokens: a cap on the tokens of prompts and answers that one command pays for, of each process, as the server
            counts them; what is on its way when it is reached still comes. None for no cap.
        dry_run: says what there is to ask, and ends before the first request.
        max_wait: seconds of the longest pause that a server may ask for (Retry-After); one that asks for more is left
            out.
        question_timeout: seconds that a question may take, retries and pauses included; then it counts as unanswered.
        max_body: bytes of the largest response that is read, compressed and decompressed; a larger one is discarded,
            and its question counts as unanswered.
        max_count: the largest number of tokens of a prompt or answer that is believed; a larger or impossible one is
            recorded as 0 tokens, and as it is in the log of attempts.
        images: how images are decoded, and which are too large.
        bounds: waits between tries, and how many failures are taken.
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
    ) -> None:
        super().__init__()
        self.images, self.bounds = images, bounds
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
        self.requests = self.tokens = self.unanswered_in_a_row = 0
        self.pool = Pool(self.hosts, max_retries, max_wait, self._back_off)
        self._untold = False  # whether on_attempt failed
        self._jitter = random.Random()

    @property
    def halted(self) -> str | None:
        """Why nothing more is sent; None while something is."""
        return self.pool.halted

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

        When the command is asked to end (:func:`safervlm.io.signals.asked_to_end`), what is on its way is given up
        within a second.

        Args:
            batch: the questions.
            sampling: how to draw.
            seed: each request's is drawn from (seed, record id); whether the server keeps to it is its affair.
            adapter: all alike: a server has one model.

        Raises:
            Unanswered: some questions got no answer; it contains the answers of the others.
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
        if self.halted is not None and not good and not asked_to_end():
            raise ArgumentError(self.halted)
        if len(good) < len(answers):
            raise Unanswered(self.halted or next(each for each in answers if isinstance(each, str)), answers)
        return good

    async def _answer_all(self, batch: ServerBatch, sampling: Sampling, seed: int) -> list[Generation | str]:
        """To each question its answer, or why there is none."""
        from safervlm.vlm.server.request import Requests

        slots = asyncio.Semaphore(self.concurrency)
        self.pool.begin()
        requests = Requests(
            self.hosts,
            self._key(),
            self.api_key_variable,
            self.timeout,
            self.bounds.connect,
            self.max_body,
            self.max_count,
            self.concurrency,
            self._tell,
        )

        async def answer(question: Question, image: str) -> Generation | str:
            async with slots:
                return await self._answer(requests, question, image, sampling, seed)

        try:
            pairs = list(zip(batch.questions, batch.image_rows, strict=True))
            tasks = [asyncio.create_task(answer(question, batch.images[row])) for question, row in pairs]
            watch = asyncio.create_task(_cancel_when_asked_to_end(tasks))
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            watch.cancel()
        finally:
            self.pool.end()
            await requests.close()
        return [
            outcome if isinstance(outcome, Generation | str) else f"{question.id}: not answered; {ENDING}"
            for (question, _), outcome in zip(pairs, outcomes, strict=True)
        ]

    async def _answer(
        self, requests: "Requests", question: Question, image: str, sampling: Sampling, seed: int
    ) -> Generation | str:
        """The answer to a question, or why there is none, whatever went wrong with it."""
        try:
            request = {
                "model": self.name,
                "messages": self._messages(question, image),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_completion_tokens": sampling.max_new_tokens,
                "seed": seed_for(seed, question.id) % 2**31,
            }
            async with asyncio.timeout(self.question_timeout):
                generation = await self._ask(requests, question.id, request)
        except Unanswered as error:
            reason = str(error)
        except TimeoutError:
            reason = f"{question.id}: no answer within vlm.question_timeout ({self.question_timeout:g} s)"
        except Exception as error:
            reason = f"{question.id}: {type(error).__name__}: {requests.cleaner.line(first_line(error))}"
        else:
            self.unanswered_in_a_row = 0
            return generation
        if self.halted is None:
            self.unanswered_in_a_row += 1
            if self.unanswered_in_a_row >= self.bounds.failures_in_a_row:
                self.pool.stop(f"vlm: {self.unanswered_in_a_row} questions in a row got no answer, the last: {reason}")
        return reason

    def _messages(self, question: Question, image: str) -> list[dict[str, Any]]:
        """The conversation up to the answer.

        Raises:
            Unanswered: the question can't be encoded.
        """
        try:
            question.prompt.encode()
        except UnicodeEncodeError as error:
            raise Unanswered(
                f"{question.id}: character {error.start + 1} of the question is half of a surrogate pair, which can't "
                "be sent; correct the question"
            ) from None
        system = [{"role": "system", "content": self.system}] if self.system else []
        if question.image_path is None and not self.blank:
            return [*system, {"role": "user", "content": question.prompt}]
        shown = {"type": "image_url", "image_url": {"url": image}}
        return [*system, {"role": "user", "content": [shown, {"type": "text", "text": question.prompt}]}]

    async def _ask(self, requests: "Requests", question: str, request: Mapping[str, Any]) -> Generation:
        """One question, as often as it takes.

        Raises:
            Unanswered: it was asked often enough, or nothing can be asked any more.
        """
        tries, pauses, answered, last = 0, 0, self.pool.answered, None
        while True:
            host = await self._free_host(last, question)
            begun = time.monotonic()
            outcome, tokens = await requests.send(host, question, request)
            if tokens is not None:
                self.tokens += tokens
                if self.max_tokens is not None and not tokens:
                    self.pool.stop(
                        f"vlm.max_tokens: {host.address} doesn't count tokens; leave it out, or use vlm.max_requests"
                    )
            match outcome:
                case Generation():
                    host.succeed()
                    return outcome
                case Unanswered():
                    raise outcome
                case Hopeless():
                    raise self.pool.stop(outcome.reason)
                case Untaken():
                    self.pool.leave_out_parameter(host, outcome)
                    continue
                case Useless():
                    self.pool.leave_out(host, outcome.reason)
                    continue
            last = host
            if outcome.pause is not None and outcome.pause > self.max_wait:
                said = f"it asks for a pause of {outcome.pause:.0f} s, more than vlm.max_wait, {self.max_wait:g} s"
                self.pool.leave_out(host, f"{said}: {outcome.reason}")
                continue
            unanswered = Unanswered(
                f"{question}: no answer after {tries + pauses + 1} requests, the last to {host.address}: "
                f"{outcome.reason}"
            )
            if outcome.by_server:
                pauses += self.pool.answered > answered  # the server answers others meanwhile
                answered = self.pool.answered
                most = self.bounds.pauses * (self.max_retries + 1)
                if not self.pool.rest(host, question, outcome, begun) or pauses > most:
                    raise unanswered
                continue
            tries += 1
            if tries > self.max_retries:
                raise unanswered
            await self.pool.wait(max(self._back_off(tries), outcome.pause or 0.0))

    async def _free_host(self, last: Host | None, question: str) -> Host:
        """A server that isn't resting; the request to it is counted.

        Nothing is awaited between the look at the caps and the count, so that they hold.

        Raises:
            Unanswered: nothing can be asked any more.
        """
        while True:
            for name, used, cap, what in (
                ("max_requests", self.requests, self.max_requests, "requests are sent"),
                ("max_tokens", self.tokens, self.max_tokens, "tokens are used"),
            ):
                if cap is not None and used >= cap:
                    self.pool.stop(
                        f"vlm.{name}: {used} {what}, the cap of one command is {cap}; what is answered is kept, the "
                        "same command goes on (with a new count)"
                    )
            if self.halted is not None:
                raise Unanswered(f"{question}: not asked; {self.halted}")
            found = self.pool.ready(last)
            if isinstance(found, Host):
                self.requests += 1
                return found
            await self.pool.wait(found)

    def _tell(self, attempt: dict[str, Any]) -> None:
        """Tells :attr:`on_attempt`; an answer that came is not lost because its log can't be written."""
        try:
            self.on_attempt(attempt)
        except Exception as error:
            if not self._untold:
                say(f"the log of attempts is incomplete: {type(error).__name__}: {first_line(error)}")
            self._untold = True

    def _back_off(self, failures: int) -> float:
        """Seconds to wait after so many failures: twice as long each time, scattered."""
        seconds = min(self.bounds.first_wait * 2.0 ** min(failures - 1, 60), self.bounds.longest_wait)
        return seconds * self._jitter.uniform(0.5, 1)

    def _key(self) -> str | None:
        """The key; it is read where it is needed, and kept nowhere."""
        key = os.environ.get(self.api_key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ArgumentError(
                f"vlm.api_key_variable: the environment variable {self.api_key_variable} holds line breaks or other "
                "characters that no key has"
            )
        return key or None


async def _cancel_when_asked_to_end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    while not asked_to_end():
        await asyncio.sleep(POLL)
    for task in tasks:
        task.cancel()
