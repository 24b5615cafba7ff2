"""Lightning callback that writes progress as plain lines if stderr is not a terminal."""

import math
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from safervlm.io.progress import Lines, in_terminal


class ProgressLines(ProgressBar):
    """Writes the progress of fit, validate and predict as plain lines, on the first process of a run.

    A validation within a training writes no lines of its own; its time is part of the training's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: Lines | None = None
        self._done = 0
        self._in_steps = False

    def disable(self) -> None:
        """Does nothing: other processes than the first one write no lines anyway."""

    def enable(self) -> None:
        """Does nothing; see :meth:`disable`."""

    @property
    def is_enabled(self) -> bool:
        """Whether the lines of a module's ``print`` go through this class, which writes them unchanged."""
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting, from what is complete if the training resumes: steps if these end it, else batches."""
        epochs, steps = trainer.max_epochs, trainer.max_steps
        total = math.inf if epochs is None or epochs < 0 else epochs * trainer.num_training_batches
        # A batch of PPO or GRPO has several steps.
        self._in_steps = steps >= 0 and steps * trainer.accumulate_grad_batches <= total
        if self._in_steps:
            self._begin(trainer, "training", steps, trainer.global_step, "steps")
        else:
            self._begin(trainer, "training", total, trainer.fit_loop.epoch_loop.total_batch_idx + 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting, if this is not a validation within a training."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._begin(trainer, "validation", sum(trainer.num_val_batches))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting the batches."""
        self._begin(trainer, "prediction", sum(trainer.num_predict_batches))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Counts the batch, or its steps."""
        self._count(trainer.global_step - self._done if self._in_steps else 1)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Counts the batch, if this is not a validation within a training."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._count()

    def on_predict_batch_end(self, *args: Any) -> None:
        """Counts the batch."""
        self._count()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the last line."""
        self._end()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the last line, if this is not a validation within a training."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._end()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the last line before the callbacks that judge, which write lines of their own."""
        self._end()

    def _begin(self, trainer: Trainer, what: str, total: float, start: int = 0, unit: str = "batches") -> None:
        self._done = start
        if trainer.is_global_zero:
            self._lines = Lines(what, total if math.isfinite(total) else None, start, unit)

    def _count(self, number: int = 1) -> None:
        self._done += number
        if self._lines is not None:
            self._lines.update(self._done)

    def _end(self) -> None:
        lines, self._lines = self._lines, None
        if lines is not None:
            lines.end()


def progress_lines() -> list[Callback]:
    """Returns the callback that replaces Lightning's bar where stderr is not a terminal; empty in a terminal."""
    return [] if in_terminal() else [ProgressLines()]
