"""CPU-time limits for untrusted text that is executed: chat templates of models, regular expressions of adapters."""

import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from safervlm.errors import ArgumentError

SECONDS = 10.0  # of CPU time; templates and expressions normally take milliseconds


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
    elsewhere = threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer")
    if elsewhere or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
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


def must_match_soon(patterns: Iterable[str], names: Iterable[str], what: str, seconds: float | None = None) -> None:
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
            f"{what}: {pattern[:200]!r} goes through too many ways to match a module's name (more than "
            f"{SECONDS if seconds is None else seconds:g} seconds); give one without repetitions within repetitions"
        )
        with computing_limit(message, seconds):
            for name in names:
                compiled.fullmatch(name)
