"""All processes of a run end after the same step; a termination request is deferred while a step runs."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safervlm.ending import agree_to_end


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
def test_termination_or_save_request_of_one_process_applies_to_all(others, received, save, agreed) -> None:
    assert agree_to_end(trainer(others, received), save) == agreed


REQUEST = """
import os, signal
from safervlm.ending import OrderlyEnd
from safervlm.io.signals import asked_to_end, listening

end = OrderlyEnd()
end.stop_deferring()  # there is none
with listening():
    end.defer()
    end.defer()
    os.kill(os.getpid(), signal.SIGTERM)
    print(asked_to_end(), flush=True)
    end.stop_deferring()
    print("not reached", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process of Windows at once")
def test_termination_request_is_deferred_to_the_end_of_the_step() -> None:
    """In a process of its own, which the request ends."""
    ended = subprocess.run([sys.executable, "-c", REQUEST], capture_output=True, text=True, check=False)
    assert ended.stdout.split() == ["True"], ended.stderr
    assert ended.returncode == 143
