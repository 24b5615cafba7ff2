"""The time that a process may take to end on a busy machine."""

import time

import pytest
from processes import PROMISE, must_end, slowdown


def ends_after(seconds: float, monkeypatch: pytest.MonkeyPatch):
    """A process that ends after some seconds of a fake clock, which only waiting advances."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda wait: now.__setitem__(0, now[0] + wait))
    return lambda: now[0] < seconds


@pytest.mark.parametrize(("seconds", "times"), [(4.9, 1), (9.8, 2), (80, 20)])
def test_time_limit_scales_with_the_slowdown_of_the_machine(seconds, times, monkeypatch):
    must_end(ends_after(seconds, monkeypatch), slowdown=lambda: times)


@pytest.mark.parametrize(("seconds", "times"), [(5.2, 1), (10.2, 2), (1e9, 20)])
def test_a_process_that_takes_longer_fails(seconds, times, monkeypatch):
    with pytest.raises(AssertionError, match="still running after"):
        must_end(ends_after(seconds, monkeypatch), slowdown=lambda: times)


def test_time_limit_uses_the_largest_measured_slowdown(monkeypatch):
    moments = iter([1.0, 3.0])
    must_end(ends_after(14, monkeypatch), slowdown=lambda: next(moments, 1.0))


def test_time_limit_is_five_seconds_and_slowdown_is_at_least_one():
    assert PROMISE == 5
    assert slowdown() >= 1
