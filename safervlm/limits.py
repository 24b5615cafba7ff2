"""Limits on the length of conversation texts, and on the CPU time of texts that are executed.

The latter are the chat template of a model and the regular expressions of an adapter.
"""

import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from safervlm.errors import ArgumentError
from safervlm.ranges import in_range

SECONDS = 10.0  # of CPU time; templates and expressions normally take milliseconds


@dataclass(frozen=True)
class TextLimits:
    """Limits of a local model's texts; none of them affects a response.

    Args:
        max_tokens: Maximum number of tokens of a prompt with its completion, unless the model itself declares a smaller
            number. A longer one is rejected, as are, before tokenisation, a text of more than 64 characters per
            token, and a chat template with an output of that length.
        seconds: Maximum CPU time, in seconds, of rendering a chat template, and of matching a regular expression of an
            adapter or of the LoRA settings.
    """

    max_tokens: int = 100_000
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        """Raises an ArgumentError for a limit that is not a positive number."""
        in_range("vlm.limits", least=1, max_tokens=self.max_tokens)
        in_range("vlm.limits", above=0, seconds=self.seconds)


@contextmanager
def computing_limit(message: str, seconds: float | None = None) -> Iterator[None]:
    """Context manager that raises after a number of seconds of the process's CPU time, whatever else the machine runs.

    It interrupts Python loops and the matching of regular expressions. It does nothing outside the main thread,
    inside another limit, or on Windows, which has no such timers.

    Args:
        message: Message of the error, one line that begins with the argument.
        seconds: Limit in seconds of CPU time; None for ``SECONDS``.

    Raises:
        ArgumentError: The block exceeded the limit.
    """
    elsewhere = threading.current_thread() is not threading.main_thread()
    if sys.platform == "win32" or elsewhere or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise ArgumentError(message)

    before = signal.signal(signal.SIGVTALRM, end)
    try:
        signal.setitimer(
            signal.ITIMER_VIRTUAL, SECONDS if seconds is None else seconds, 1.0
        )  # repeats every second of CPU time: the code within may catch a single exception
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def reject_slow_patterns(
    patterns: Iterable[str], names: Iterable[str], what: str, seconds: float | None = None
) -> None:
    """Rejects regular expressions that take too long to match (catastrophic backtracking).

    Args:
        patterns: Regular expressions; invalid ones are skipped.
        names: Texts that the expressions will be matched against.
        what: Source of the expressions for the error message, beginning with the argument.
        seconds: Limit in seconds of CPU time per expression; None for ``SECONDS``.

    Raises:
        ArgumentError: An expression exceeded the limit.
    """
    names = list(names)
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error:
            continue
        message = (
            f"{what}: {pattern[:200]!r} takes too long to match a module's name (more than "
            f"{SECONDS if seconds is None else seconds:g} seconds); give one without repetitions within repetitions"
        )
        with computing_limit(message, seconds):
            for name in names:
                compiled.fullmatch(name)
