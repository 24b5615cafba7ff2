"""Progress: when a line is written, its contents, and the bar in a terminal."""

import sys
from io import StringIO

import pytest

from safervlm.io import progress as module
from safervlm.io.progress import Lines, duration, progress, track


class Clock:
    """A fake clock that advances only on request."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def lines_of(
    clock: Clock, capsys: pytest.CaptureFixture[str], total: float | None, seconds: float, count: int, start: int = 0
) -> list[str]:
    """The lines that ``count`` items of ``seconds`` each write."""
    lines = Lines("x", total, start)
    for done in range(start + 1, start + count + 1):
        clock.now += seconds
        lines.update(done)
    lines.end()
    said = capsys.readouterr()
    assert not said.out
    return said.err.splitlines()


def test_a_short_run_writes_one_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(clock, capsys, 100, 0.25, 100) == ["x: 100 % (100 of 100), 4/s, took 0:00:25"]


@pytest.mark.parametrize(
    ("total", "seconds", "every"),
    [
        (100, 1, 30),  # 5 % take 5 s: every 30 s
        (100, 30, 5),  # 5 % take 150 s: every 5 %
        (10, 100, 1),  # an item is more than 5 %
    ],
)
def test_progress_line_is_due_after_both_minimum_time_and_share(
    total: int, seconds: float, every: int, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(clock, capsys, total, seconds, total)
    expected = [*range(every, total, every), total]
    assert [int(line.split("(")[1].split(" of")[0]) for line in lines] == expected


def test_a_line_has_percentage_rate_and_remaining_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    first, *_, last = lines_of(clock, capsys, 1000, 7.2, 1000)
    assert first == "x: 5 % (50 of 1000), 0.139/s, 1:54:00 left"
    assert last == "x: 100 % (1000 of 1000), 0.139/s, took 2:00:00"


def test_rate_of_a_resumed_run_excludes_earlier_work(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = lines_of(clock, capsys, 100, 10, 6, start=94)
    assert first == "x: 99 % (99 of 100), 0.1/s, 0:00:10 left"
    assert last == "x: 100 % (100 of 100), 0.1/s, took 0:01:00"


def test_without_a_total_only_time_counts(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(clock, capsys, None, 20, 5) == ["x: 2, 0.05/s", "x: 4, 0.05/s", "x: 5, 0.05/s, took 0:01:40"]


def test_work_that_ends_early_states_how_much_is_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(clock, capsys, 8, 1, 2) == ["x: 25 % (2 of 8), 1/s, took 0:00:02"]


def test_empty_work_writes_no_progress_line(capsys: pytest.CaptureFixture[str]) -> None:
    Lines("x", 0).end()
    assert list(track([], "x")) == []
    assert not "".join(capsys.readouterr())


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 3661, 90000)] == [
        "0:00:00",
        "0:01:00",
        "1:01:01",
        "1 day, 1:00:00",
    ]


def test_track_yields_all_items_and_escapes_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "a [b]\x1b[31m\n")) == [0, 1, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("a [b]")
    assert ": 100 % (3 of 3)" in line
    assert line.isprintable()


def test_error_ends_progress_without_a_final_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with progress("x", 2) as update:
            update(1)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert not capsys.readouterr().err


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track(range(3), "a [b]")) == [0, 1, 2]
    shown = terminal.getvalue()
    assert "a [b]" in shown
    assert "━" in shown
    assert "100%" in shown
    assert " of 3" not in shown
