"""Private names of Lightning without a public counterpart; no other module of the package uses them.

Each entry states the condition under which it can be removed ("Remove when"). Those of transformers and torch are in
:mod:`safervlm.vlm.compat`.
"""

import subprocess
from collections.abc import Callable
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies.launchers import subprocess_script

# Remove when the handling of SIGTERM can be configured.
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector as SignalConnector

__all__ = ["SignalConnector", "connect_signals", "observe_processes", "signals_of", "validation_follows"]


def connect_signals(trainer: Trainer, connector: SignalConnector) -> None:
    """Replaces the trainer's handling of signals. Remove together with ``SignalConnector``.

    Args:
        trainer: Trainer.
        connector: Connector that handles signals from now on.
    """
    trainer._signal_connector = connector


def signals_of(trainer: Trainer) -> SignalConnector:
    """Returns the connector that handles the trainer's signals. Remove together with ``SignalConnector``.

    Args:
        trainer: Trainer.
    """
    return trainer._signal_connector


def observe_processes(observe: Callable[[list["subprocess.Popen[Any]"]], None]) -> None:
    """Replaces Lightning's observer of the processes that it launches.

    Remove when Lightning's own observer ends the other processes in an orderly way if one of them dies.

    Args:
        observe: Called with the processes, after they are started.
    """
    subprocess_script._launch_process_observer = observe  # type: ignore[assignment]


def validation_follows(trainer: Trainer) -> bool:
    """Returns whether a validation follows the current training batch.

    Remove when the trainer has a public method for this.

    Args:
        trainer: Trainer, within a hook at the end of a training batch.
    """
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
