"""A limit on what somebody else's text may compute: a model's chat template, an adapter's regular expression."""

import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from safervlm.errors import ArgumentError

SECONDS = 10.0  # of computing; a template and an expression take milliseconds


@contextmanager
def computing_limit(message: str, seconds: float | None = None) -> Iterator[None]:
    """Ends what is computed within it after some seconds of the process's CPU time, whatever else the machine does.

    It reaches loops of Python and the search for a match of a regular expression. Outside of the main thread, and
    within another limit, it does nothing.

    Args:
        message: the line to raise, beginning with the argument.
        seconds: of CPU time; None for ``SECONDS``.

    Raises:
        ArgumentError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise ArgumentError(message)

    before = signal.signal(signal.SIGVTALRM, end)
    try:
        signal.setitimer(
            signal.ITIMER_VIRTUAL, SECONDS if seconds is None else seconds, 1.0
        )  # again and again: the code within may catch one
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def must_match_soon(patterns: Iterable[str], names: Iterable[str], what: str, seconds: float | None = None) -> None:
    """Rejects regular expressions that go through too many ways to match one of some names.

    Args:
        patterns: the expressions; one that is none is passed over.
        names: that will be matched.
        what: has the expressions, beginning with the argument.
        seconds: of CPU time that each may take; None for ``SECONDS``.

    Raises:
        ArgumentError: it took longer.
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
