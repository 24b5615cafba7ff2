"""Scheduling over several servers: which one is used next, which backs off, which is excluded, and when to stop."""

import asyncio
import random
import time
from collections.abc import Callable

from safervlm.errors import RecordError
from safervlm.io.tables import say
from safervlm.vlm.server.host import Host
from safervlm.vlm.server.outcomes import RejectedParameter, TransientFailure

LONG = 60.0  # pauses longer than this, in seconds, are reported


class Pool:
    """The servers, and whether any request can be sent at all.

    Args:
        hosts: The servers.
        max_retries: Number of consecutive failures that a server may have; one more excludes it.
        back_off: Function that returns the back-off time in seconds for a number of consecutive failures.

    Attributes:
        halted: Reason why no more requests are sent, in one line; None while requests are sent.
        unanswered_in_a_row: Number of consecutive questions without a response.
    """

    def __init__(self, hosts: list[Host], max_retries: int, back_off: Callable[[int], float]) -> None:
        self.hosts, self.max_retries, self.back_off = hosts, max_retries, back_off
        self.halted: str | None = None
        self.unanswered_in_a_row = 0
        self._halt: asyncio.Event | None = None  # of the current batch; set to wake waiting questions
        self._jitter = random.Random()

    def begin(self) -> None:
        """Prepares for a batch, which runs in its own event loop."""
        self._halt = asyncio.Event()

    def end(self) -> None:
        """Cleans up after a batch."""
        self._halt = None

    @property
    def answered(self) -> int:
        """Number of responses so far, over all servers."""
        return sum(host.answered for host in self.hosts)

    def ready(self, last: Host | None) -> Host | float:
        """Returns the least busy available server, or the time until one is available.

        Args:
            last: Server that the question was sent to last; others are preferred. None for none.

        Returns:
            The server, or the seconds until the first server is available, with some jitter.
        """
        now = time.monotonic()
        there = [host for host in self.hosts if not host.excluded]
        ready = [host for host in there if host.ready <= now]
        if ready:
            return min(ready, key=lambda host: (host is last, host.busy, host.sent))
        # Jitter, so that not all questions are sent at once.
        return min(host.ready for host in there) - now + self._jitter.uniform(0, 0.1)

    async def wait(self, seconds: float) -> None:
        """Sleeps, or returns early when no more requests can be sent.

        Args:
            seconds: Time to sleep.
        """
        assert self._halt is not None  # noqa: S101 (set before any question is asked; narrows the type)
        try:
            async with asyncio.timeout(seconds):
                await self._halt.wait()
        except TimeoutError:
            pass

    def suspend(self, host: Host, question: str, failure: TransientFailure, begun: float) -> bool:
        """Makes a server back off after a failure, or excludes it after too many consecutive failures.

        Args:
            host: The server.
            question: Id of the question that met the failure.
            failure: The failure.
            begun: When the request was sent, by the monotonic clock.

        Returns:
            Whether the question may be asked again. False if only this question met the failures of a server that had
            answered others.
        """
        now = time.monotonic()
        if begun < host.suspended or host.excluded:
            return True  # sent before the current back-off began: already counted
        host.failures += 1
        host.failing.add(question)
        host.suspended = now
        pause = max(self.back_off(host.failures), failure.pause or 0.0)
        host.ready = max(host.ready, now + pause)
        if host.failures <= self.max_retries:
            if pause > LONG:
                say(f"{host.address} asks for a pause of {pause:.0f} s ({failure.reason})")
            return True
        if failure.said and host.answered and len(host.failing) == 1:
            host.recover()
            return False
        self.exclude(host, failure.reason)
        return True

    def exclude(self, host: Host, reason: str) -> None:
        """Excludes a server permanently; stops the run if no other server remains.

        Args:
            host: The server.
            reason: Reason in one line.
        """
        if host.excluded:
            return
        host.excluded = True
        others = [other.address for other in self.hosts if not other.excluded]
        if others:
            say(f"{host.address} is skipped ({reason}); its questions go to {', '.join(others)}")
        else:
            self.stop(
                f"vlm.addresses: no server responds any more, the last was {host.address} ({reason}); what is "
                "answered is kept, the same command resumes when one is up"
            )

    def omit_parameter(self, host: Host, rejected: RejectedParameter) -> None:
        """Stops sending a parameter to a server, or sends it under its old name, and reports this once.

        Args:
            host: The server.
            rejected: The parameter, and the reason.
        """
        instead = {"max_completion_tokens": "max_tokens is sent instead", "seed": "its responses can't be repeated"}
        if rejected.name not in host.omitted:
            host.omitted.add(rejected.name)
            said = instead.get(rejected.name, "it is 1 anyway")
            say(f"{host.address} doesn't take {rejected.name} ({rejected.reason}): {said}")

    def stop(self, reason: str) -> RecordError:
        """Stops sending requests; requests in progress may finish.

        Args:
            reason: Reason in one line. The reason of an earlier stop is kept.

        Returns:
            The exception to raise for a question that is not asked.
        """
        self.halted = self.halted or reason
        if self._halt is not None:
            self._halt.set()
        return RecordError(self.halted)
