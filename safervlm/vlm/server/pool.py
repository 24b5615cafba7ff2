"""Several servers that share the work: which is asked next, which rests, which is left out, and when all is over."""

import asyncio
import random
import time
from collections.abc import Callable

from safervlm.io.tables import say
from safervlm.vlm.base import Unanswered
from safervlm.vlm.server.host import Host
from safervlm.vlm.server.outcomes import Passing, Untaken

LONG = 60.0  # seconds of a pause that is worth a line


class Pool:
    """The servers, and whether anything can be asked at all.

    Args:
        hosts: the servers.
        max_retries: how often in a row one may fail before it is left out.
        max_wait: seconds of the longest pause that one may ask for.
        back_off: seconds to wait after so many failures.

    Attributes:
        halted: why nothing more is sent, in one line; None while something is.
    """

    def __init__(self, hosts: list[Host], max_retries: int, max_wait: float, back_off: Callable[[int], float]) -> None:
        self.hosts, self.max_retries, self.max_wait, self.back_off = hosts, max_retries, max_wait, back_off
        self.halted: str | None = None
        self._halt: asyncio.Event | None = None  # of the batch at work: wakes those that wait
        self._jitter = random.Random()

    def begin(self) -> None:
        """A batch begins, in an event loop of its own."""
        self._halt = asyncio.Event()

    def end(self) -> None:
        """The batch is over."""
        self._halt = None

    @property
    def answered(self) -> int:
        """Answers so far."""
        return sum(host.answered for host in self.hosts)

    def ready(self, last: Host | None) -> Host | float:
        """The least busy server that isn't resting, rather another one than the last; or seconds until one is ready."""
        now = time.monotonic()
        there = [host for host in self.hosts if not host.out]
        ready = [host for host in there if host.ready <= now]
        if ready:
            return min(ready, key=lambda host: (host is last, host.busy, host.sent))
        # A little apart, so that a server isn't met by all at once.
        return min(host.ready for host in there) - now + self._jitter.uniform(0, 0.1)

    async def wait(self, seconds: float) -> None:
        """Sleeps, unless there is nothing to wait for any more."""
        assert self._halt is not None  # noqa: S101 (set before any question is asked; for the type checker)
        try:
            async with asyncio.timeout(seconds):
                await self._halt.wait()
        except TimeoutError:
            pass

    def rest(self, host: Host, question: str, failure: Passing, begun: float) -> bool:
        """Leaves a server alone for a while, or for good if it failed too often in a row.

        Args:
            host: the server.
            question: the id of the one that met the failure.
            failure: what happened.
            begun: when the request was sent, by the monotonic clock.

        Returns:
            Whether the question may be asked again; not where it alone met a failing server that had answered others.
        """
        now = time.monotonic()
        if begun < host.rested or host.out:
            return True  # sent before the rest began: it is no news
        host.failures += 1
        host.failing.add(question)
        host.rested = now
        pause = max(self.back_off(host.failures), failure.pause or 0.0)
        host.ready = max(host.ready, now + pause)
        if host.failures <= self.max_retries:
            if pause > LONG:
                say(f"{host.address} asks for a pause of {pause:.0f} s ({failure.reason})")
            return True
        if failure.said and host.answered and len(host.failing) == 1:
            host.recover()
            return False
        self.leave_out(host, failure.reason)
        return True

    def leave_out(self, host: Host, reason: str) -> None:
        """Asks a server no more; without any other, nothing more is sent."""
        if host.out:
            return
        host.out = True
        others = [other.address for other in self.hosts if not other.out]
        if others:
            say(f"{host.address} is left out ({reason}); its questions go to {', '.join(others)}")
        else:
            self.stop(
                f"vlm.addresses: no server answers any more, the last was {host.address} ({reason}); what is "
                "answered is kept, the same command goes on when one is up"
            )

    def leave_out_parameter(self, host: Host, untaken: Untaken) -> None:
        """Sends a parameter no more, or under its old name."""
        instead = {"max_completion_tokens": "max_tokens is sent instead", "seed": "its answers can't be repeated"}
        if untaken.name not in host.left_out:
            host.left_out.add(untaken.name)
            said = instead.get(untaken.name, "it is 1 anyway")
            say(f"{host.address} doesn't take {untaken.name} ({untaken.reason}): {said}")

    def stop(self, reason: str) -> Unanswered:
        """Nothing more is sent; what is on its way may come."""
        self.halted = self.halted or reason
        if self._halt is not None:
            self._halt.set()
        return Unanswered(self.halted)
