"""Back-off times and failure limits for requests to servers."""

import math
from dataclasses import dataclass

from safervlm.errors import ArgumentError


@dataclass(frozen=True)
class Bounds:
    """Back-off times and failure limits; none of them affects a response.

    Args:
        connect: Maximum time to connect to a server, in seconds; never more than ``timeout``.
        first_wait: First back-off time, in seconds, before a question is retried or a failed server is used again. It
            doubles with each further failure.
        longest_wait: Maximum back-off time, in seconds. Pauses that a server requests are limited by ``max_wait``
            instead.
        failures_in_a_row: Number of consecutive questions without a response that stops the run, because the questions
            are then unlikely to be the cause.
        pauses: Factor of the retry limit for requested pauses. A question may receive a request for a pause,
            while the server answers others, this many times ``max_retries`` + 1 times.
    """

    connect: float = 10.0
    first_wait: float = 1.0
    longest_wait: float = 60.0
    failures_in_a_row: int = 20
    pauses: int = 4

    def __post_init__(self) -> None:
        """Validates the values.

        Raises:
            ArgumentError: A wait is not positive and finite, a count is below 1, or the longest wait is below the
                first.
        """
        for name in ("connect", "first_wait", "longest_wait"):
            if not 0 < getattr(self, name) < math.inf:
                raise ArgumentError(
                    f"vlm.bounds.{name}: more than 0 seconds, and not infinite, got {getattr(self, name)}"
                )
        for name in ("failures_in_a_row", "pauses"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"vlm.bounds.{name}: at least 1, got {getattr(self, name)}")
        if self.longest_wait < self.first_wait:
            raise ArgumentError(
                f"vlm.bounds.longest_wait: at least first_wait, {self.first_wait:g} s, got {self.longest_wait:g}"
            )
