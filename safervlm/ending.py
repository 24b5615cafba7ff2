"""Ends a Lightning run on request: all processes end after the same step, with its result on disk."""

import signal
import threading

import torch
from lightning import Trainer

from safervlm.compat import SignalConnector, connect_signals, observe_processes, signals_of
from safervlm.io.signals import asked_to_end, observe, pass_safe_point, wait_for_safe_point, watch_peers


class Signals(SignalConnector):
    """Signal connector of Lightning that uses the request handling of :mod:`safervlm.io.signals`.

    Lightning's own handler communicates with the other processes from within the handler, and may block forever.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.agreed: bool | None = None
        super().__init__(trainer)

    @property
    def received_sigterm(self) -> bool:
        """Whether to end now. During training it changes only when all processes have agreed, and can save."""
        return asked_to_end() if self.agreed is None else self.agreed

    @received_sigterm.setter
    def received_sigterm(self, value: bool) -> None:
        """Ignores the assignment; Lightning initialises the flag with False.

        Args:
            value: Ignored.
        """

    def register_signal_handlers(self) -> None:
        """Registers Lightning's handlers, for Slurm's signals, but keeps our handler of SIGTERM."""
        ours = signal.getsignal(signal.SIGTERM)
        super().register_signal_handlers()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def agree_to_end(trainer: Trainer, save: bool = False) -> tuple[bool, bool]:
    """Returns whether any process is asked to end, and whether any wants to save; a collective operation.

    All processes must call it after the same step.

    Args:
        trainer: Trainer of the fit; it ends after this step if the first value is True.
        save: Whether this process wants to save a checkpoint, which may depend on its clock.
    """
    connector = signals_of(trainer)
    here = torch.tensor([trainer.received_sigterm or asked_to_end(), save], dtype=torch.int64)
    ends, saves = trainer.strategy.reduce(here.to(trainer.strategy.root_device), reduce_op="sum").tolist()
    if isinstance(connector, Signals):
        connector.agreed = bool(ends)
    return bool(ends), bool(saves)


class OrderlyEnd:
    """Defers requests to end while a loop runs, and connects the processes of a run; used by one callback of a trainer.

    It must be created before Lightning launches the other processes of the run.
    """

    def __init__(self) -> None:
        self._defers = False
        observe_processes(observe)

    def connect(self, trainer: Trainer) -> None:
        """Replaces Lightning's signal handling, and exchanges the process ids; a collective operation.

        Args:
            trainer: Trainer of the run.
        """
        connect_signals(trainer, Signals(trainer))
        watch_peers(trainer.global_rank)

    def defer(self) -> None:
        """Defers requests to end until the current step is complete; a second call does nothing."""
        if not self._defers:
            wait_for_safe_point()
        self._defers = True

    def stop_deferring(self) -> None:
        """Ends the deferral; does nothing if there is none.

        Raises:
            SystemExit: The process was asked to end in between.
        """
        defers, self._defers = self._defers, False
        if defers:
            pass_safe_point()
