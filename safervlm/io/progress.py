"""Progress of long work on stderr: a bar in a terminal, plain lines elsewhere, as in the log of a batch job.

A line is written once at least 5 % more is done and at least 30 s have passed since the line before, and one at the
end. Only the first process of a run shows progress: callers skip the others.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeRemainingColumn

from safervlm.io.escape import for_terminal

SECONDS = 30.0  # minimum time between two lines
SHARE = 0.05  # minimum share of the whole between two lines

T = TypeVar("T")


class Lines:
    """Progress as plain lines without control characters.

    Args:
        what: Name of the task; the beginning of each line.
        total: Total number of items. None if it is unknown: then lines depend on the time only.
        start: Number of items that were complete before, as in a resumed training; they don't count for the rate.
        unit: Plural name of the items; may be empty.
    """

    def __init__(self, what: str, total: float | None, start: float = 0, unit: str = "") -> None:
        self._what, self._total, self._start, self._unit = for_terminal(what), total, start, unit
        self._done = self._done_at_line = start
        self._began = self._time_of_line = time.monotonic()

    def update(self, done: float) -> None:
        """Records progress, and writes a line if one is due.

        Args:
            done: Number of items that are complete now.
        """
        self._done = done
        now = time.monotonic()
        more = self._total is None or done - self._done_at_line >= SHARE * self._total
        if more and now - self._time_of_line >= SECONDS and done != self._total:
            self._write(now)

    def end(self) -> None:
        """Writes the last line, with the total time; nothing if there was nothing to do."""
        if self._done > self._start:
            self._write(time.monotonic(), ended=True)

    def _write(self, now: float, ended: bool = False) -> None:
        passed = now - self._began
        rate = (self._done - self._start) / passed if passed > 0 else 0.0
        unit = f" {self._unit}" if self._unit else ""
        line = f"{self._done:.0f}{unit}"
        if self._total:
            line = f"{100 * self._done / self._total:.0f} % ({self._done:.0f} of {self._total:.0f}{unit})"
        line += f", {rate:.3g}{unit}/s" if rate else ""
        if ended:
            line += f", took {duration(passed)}"
        elif self._total and rate:
            line += f", {duration((self._total - self._done) / rate)} left"
        self._done_at_line, self._time_of_line = self._done, now
        print(f"{self._what}: {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Returns a duration as hours, minutes and seconds, such as ``0:01:30``.

    Args:
        seconds: Duration, in seconds.
    """
    return str(timedelta(seconds=round(seconds)))


def in_terminal() -> bool:
    """Returns whether stderr is a terminal, where progress is shown as a bar."""
    return sys.stderr.isatty()


@contextmanager
def progress(what: str, total: float | None, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Context manager that shows progress: a bar in a terminal, else lines.

    Args:
        what: Name of the task.
        total: Total number of items; None if it is unknown.
        unit: Plural name of the items, for the lines; may be empty.

    Yields:
        A function to call with the number of items that are complete.
    """
    if in_terminal():
        columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(elapsed_when_finished=True))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(escape(for_terminal(what)), total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        lines = Lines(what, total, unit=unit)
        yield lines.update
        lines.end()


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Iterates over items and shows the progress; shows nothing if there are none.

    Args:
        items: Items.
        what: Name of the task, such as ``Judging``.

    Yields:
        The items.
    """
    if not items:
        return
    with progress(what, len(items)) as update:
        for done, item in enumerate(items, 1):
            yield item
            update(done)
