"""Checkpoints from which a run resumes exactly."""

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from callbacks.generation_check import GenerationCheck
from safervlm.compat import validation_follows
from safervlm.ending import agree_to_end
from safervlm.finite import require_finite_weights
from safervlm.io.caches import temporary_folder
from safervlm.io.seals import origin_of, seal_file, seal_folder
from safervlm.io.sharded import link_to_checkpoint_folder
from safervlm.io.signals import grace
from safervlm.ranges import in_range
from safervlm.run_folder import RunFolder

RECENT = 10  # number of batches after a long step that still count as long


class LastCheckpoint(Callback):
    """Writes ``checkpoints/last.ckpt`` in the run folder, only at the end of training batches.

    Lightning's ``ModelCheckpoint`` counts optimizer steps, of which a PPO rollout has several. It may save between the
    updates of a rollout, where a run cannot be resumed exactly. Here a rollout is one batch. The file is replaced
    atomically, so a process that dies while saving leaves the previous checkpoint intact.

    A process that receives a request to end has ``SAFERVLM_GRACE`` seconds (:mod:`safervlm.io.signals`), too few for a
    long step. To lose at most the current step, a checkpoint is written after each long step and the ten batches that
    follow it, and before a validation or a long :class:`GenerationCheck`. Short steps cause no extra checkpoints. The
    time spent waiting for data is not part of a step.

    Args:
        every_n_batches: The number of batches between checkpoints. A run that is asked to end (SIGTERM) saves at the
            end of its current batch. If gradients are accumulated over several batches, it waits for their optimizer
            step, because a checkpoint does not contain gradients.
        long_step: The duration in seconds, including the time of saving, above which a step is long; None for half of
            ``SAFERVLM_GRACE``.
    """

    def __init__(self, every_n_batches: int = 50, long_step: float | None = None) -> None:
        in_range(least=1, every_n_batches=every_n_batches)
        in_range(above=0, long_step=long_step)
        self.every_n_batches, self.long_step = every_n_batches, long_step
        self._saved = 0
        self._limit = math.inf
        self._begun = self._step = self._saving = 0.0  # in seconds
        self._long_until = 0  # number of a batch
        self._steps = 0  # optimizer steps before the current batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Moves this callback after all others, so that their files of a batch are written before its checkpoint."""
        # A new list, because Lightning is iterating over the old one.
        trainer.callbacks = [other for other in trainer.callbacks if other is not self] + [self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts from the batch at which the run resumes."""
        self._saved = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self._limit = grace() / 2 if self.long_step is None else self.long_step
        loop = trainer.fit_loop
        progress: Any = loop.epoch_progress.total
        if loop.restarted_mid_epoch and progress.processed == progress.started:
            # The checkpoint was written at an epoch's end. Lightning (2.6) has counted this epoch as complete, but
            # would not count the start of the next one, so that a run that resumes twice repeats batches.
            loop.reset_restart_stage()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock and notes the optimizer step, after the hooks of the other callbacks."""
        self._begun, self._steps = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if a checkpoint is due, a step is long, or the run ends.

        Raises:
            NotFiniteError: A trained weight is NaN or infinite; no checkpoint is written.
        """
        loop = trainer.fit_loop.epoch_loop
        batches = loop.total_batch_idx + 1
        last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        last |= 0 < trainer.max_steps <= trainer.global_step
        self._step += time.monotonic() - self._begun
        if pl_module.automatic_optimization and trainer.global_step == self._steps:  # gradients are accumulated
            return
        if self._step + self._saving > self._limit:
            self._long_until = batches + RECENT
        self._step = 0.0
        long = batches <= self._long_until or self._long_work_follows(trainer, batches)
        ends, long = agree_to_end(trainer, long)
        if ends or long or batches - self._saved >= self.every_n_batches or last:
            begun = time.monotonic()
            require_finite_weights(pl_module)
            save_last(trainer, RunFolder(trainer.default_root_dir).checkpoints)
            self._saved = batches
            self._saving = time.monotonic() - begun

    def _long_work_follows(self, trainer: Trainer, batches: int) -> bool:
        """Whether a validation, or a generation check whose last run was long, precedes the next batch."""
        if validation_follows(trainer) and sum(trainer.num_val_batches) > 0:
            return True
        checks = [each for each in trainer.callbacks if isinstance(each, GenerationCheck)]  # type: ignore[attr-defined]
        return any(check.is_due(batches) and check.seconds > self._limit for check in checks)


def save_last(trainer: Trainer, folder: Path) -> None:
    """Writes ``last.ckpt`` atomically, with its seal (:mod:`safervlm.io.seals`).

    The checkpoint of a sharded strategy is a folder, and ``last.ckpt`` a link to it (:mod:`safervlm.io.sharded`). All
    processes call this function. The user's own files in the folder are kept, whatever their names.

    Args:
        trainer: The trainer of the fit.
        folder: The folder of the checkpoints.
    """
    last = folder / RunFolder("").last_checkpoint.name
    with ExitStack() as stack:
        aside = None
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            aside = str(stack.enter_context(temporary_folder(folder)))
        following = Path(trainer.strategy.broadcast(aside)) / last.name  # type: ignore[arg-type]
        trainer.save_checkpoint(following)
        if trainer.is_global_zero:
            origin = origin_of(trainer.lightning_module)
            if following.is_dir():
                seal_folder(following, origin)
                link_to_checkpoint_folder(following, last)
            else:
                seal_file(following, origin)
                following.replace(last)
        trainer.strategy.barrier("last-checkpoint")
