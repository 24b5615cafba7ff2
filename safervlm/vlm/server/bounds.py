"""How long a server is waited for, and how often it is tried again."""

import math
from dataclasses import dataclass

from safervlm.errors import ArgumentError


@dataclass(frozen=True)
class Bounds:
    """Waits between tries, and how many failures are taken; none of them decides an answer.

    Args:
        connect: seconds that a server may take to be reached; never more than ``timeout``.
        first_wait: seconds before a question is asked again, or a server that failed is; each time twice as long.
        longest_wait: seconds of the longest such wait. A pause that a server asks for is bounded by ``max_wait``.
        failures_in_a_row: so many questions without an answer, none in between, stop the run: they are not at fault.
        pauses: a question may meet a server's request for a pause, while the server answers others, so many times
            ``max_retries`` + 1 times.
    """

    connect: float = 10.0
    first_wait: float = 1.0
    longest_wait: float = 60.0
    failures_in_a_row: int = 20
    pauses: int = 4

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ArgumentError: a wait that is not positive and finite, a number below 1, or a longest wait below the first.
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
