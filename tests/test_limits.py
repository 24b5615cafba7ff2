"""Limits on the computation that a model's or adapter's own text may cause."""

import re
import signal
import threading

import pytest

from safervlm.limits import computing_limit, reject_slow_patterns


def forever() -> None:
    while True:
        pass


def limited() -> None:
    with computing_limit("what: too long", 0.1):
        try:
            forever()
        except ValueError:
            forever()


def test_time_limit_ends_a_loop_that_catches_exceptions():
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(ValueError, match=r"^what: too long"):
        limited()
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_computation_within_the_time_limit_is_not_interrupted():
    with computing_limit("what", 60), computing_limit("within it", 1e-6):
        assert sum(range(100_000)) == 4_999_950_000
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 1
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_another_thread_has_no_limit():
    done = []

    def work() -> None:
        with computing_limit("what", 1e-6):
            done.append(sum(range(100_000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [4_999_950_000]


NAMES = ["model.language_model.layers.11.self_attn.q_proj", "model.vision_tower.encoder.layers.3.mlp.fc1"]


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!", r"(.*)*(.*)*(.*)*x!", r"((\w|\.)+)+$!"])
def test_an_expression_that_backtracks_without_end_is_rejected(pattern):
    with pytest.raises(ValueError, match=rf"^lora: {re.escape(repr(pattern))} takes too long to match") as raised:
        reject_slow_patterns([".*q_proj", pattern], NAMES, "lora", seconds=0.2)
    assert "\n" not in str(raised.value)


def test_ordinary_expressions_are_accepted():
    reject_slow_patterns(
        [r".*\.layers\.\d+\.(\w+\.)*(\w+_proj|fc[12])", "q_proj", "no (expression"], NAMES, "lora", seconds=5
    )
