"""Checkpoints that a run continues from exactly."""

import shutil
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer


class LastCheckpoint(Callback):
    """Keeps ``checkpoints/last.ckpt`` in the run folder, written at the end of a training batch and nowhere else.

    Lightning's own ``ModelCheckpoint`` counts optimizer steps, of which a PPO rollout has several, and may save in the
    middle of a rollout's updates, where nothing can be continued exactly. Here a rollout is one batch. The file is
    replaced in one move, so a process that dies while saving leaves the checkpoint before.

    Args:
        every_n_batches: how often; a run that is asked to end (SIGTERM) saves at its next batch's end.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches: at least 1, got {every_n_batches}")
        self.every_n_batches = every_n_batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is time to."""
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if batches % self.every_n_batches == 0 or last or trainer.received_sigterm:
            folder = Path(trainer.default_root_dir) / "checkpoints"
            save_last(trainer, folder)


def save_last(trainer: Trainer, folder: Path) -> None:
    """Writes ``last.ckpt`` in one move; a sharded strategy's checkpoint is a folder."""
    following, last = folder / "next.ckpt", folder / "last.ckpt"
    trainer.save_checkpoint(following)
    if trainer.is_global_zero:
        if following.is_dir() and last.is_dir():
            shutil.rmtree(last)
        following.replace(last)
    trainer.strategy.barrier("last-checkpoint")
