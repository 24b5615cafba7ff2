"""All processes of a run end after the same step; a request is deferred while a step runs."""

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safervlm.ending import OrderlyEnd, agree_to_end
from safervlm.io.signals import asked_to_end, listening


def trainer(others: tuple[int, int], received: bool = False) -> Any:
    """A trainer of several processes, of which ``others`` are asked to end and want to save."""
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"), reduce=lambda here, reduce_op: here + torch.tensor(others)
    )
    return SimpleNamespace(strategy=strategy, received_sigterm=received, _signal_connector=None)


@pytest.mark.parametrize(
    ("others", "received", "save", "agreed"),
    [
        ((0, 0), False, False, (False, False)),
        ((1, 0), False, False, (True, False)),  # another process is asked to end
        ((0, 2), False, False, (False, True)),  # two others want to save
        ((0, 0), True, False, (True, False)),
        ((0, 0), False, True, (False, True)),
    ],
)
def test_one_process_that_is_asked_ends_all(others, received, save, agreed) -> None:
    assert agree_to_end(trainer(others, received), save) == agreed


def test_a_request_waits_for_the_end_of_the_step() -> None:
    end, done = OrderlyEnd(), []
    with pytest.raises(SystemExit) as ended, listening():  # noqa: PT012
        end.defer()
        end.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(asked_to_end())
        end.stop_deferring()
        done.append("not reached")
    assert done == [True]
    assert ended.value.code == 143
    end.stop_deferring()  # there is none
