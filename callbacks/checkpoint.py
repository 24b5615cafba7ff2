"""Checkpoints that a run continues from exactly."""

import shutil
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from safervlm.finite import must_have_finite_weights
from safervlm.io.seals import origin_of, seal_file, seal_folder
from safervlm.ranges import in_range
from safervlm.run import agree_to_end


class LastCheckpoint(Callback):
    """Keeps ``checkpoints/last.ckpt`` in the run folder, written at the end of a training batch and nowhere else.

    Lightning's own ``ModelCheckpoint`` counts optimizer steps, of which a PPO rollout has several, and may save in the
    middle of a rollout's updates, where nothing can be continued exactly. Here a rollout is one batch. The file is
    replaced in one move, so a process that dies while saving leaves the checkpoint before.

    Args:
        every_n_batches: how often; a run that is asked to end (SIGTERM) saves at its next batch's end. Where gradients
            are accumulated over batches, it waits for their optimizer step: a checkpoint doesn't hold gradients.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        in_range(least=1, every_n_batches=every_n_batches)
        self.every_n_batches = every_n_batches
        self._saved = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Goes behind all other callbacks: what they write about a batch is there before its checkpoint."""
        # A new list: Lightning is going through the old one.
        trainer.callbacks = [other for other in trainer.callbacks if other is not self] + [self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts from where the run goes on."""
        self._saved = trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is time to."""
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        last |= 0 < trainer.max_steps <= trainer.global_step
        if pl_module.automatic_optimization and trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if agree_to_end(trainer) or batches - self._saved >= self.every_n_batches or last:
            must_have_finite_weights(pl_module)
            save_last(trainer, Path(trainer.default_root_dir) / "checkpoints")
            self._saved = batches


def save_last(trainer: Trainer, folder: Path) -> None:
    """Writes ``last.ckpt`` in one move, with its seal (:mod:`safervlm.io.seals`).

    A sharded strategy's checkpoint is a folder, and a folder can't be replaced in one move: there ``last.ckpt`` is a
    link, which can.
    """
    last, following = folder / "last.ckpt", folder / "next.ckpt"
    before = folder / last.readlink() if last.is_symlink() else None
    if before == following:
        following = folder / "other.ckpt"
    if trainer.is_global_zero and following.is_dir():
        shutil.rmtree(following)  # what a process that died while saving left
    trainer.strategy.barrier("last-checkpoint-begin")
    trainer.save_checkpoint(following)
    if trainer.is_global_zero:
        origin = origin_of(trainer.lightning_module)
        if following.is_dir():
            seal_folder(following, origin)
            link = folder / "link"
            link.unlink(missing_ok=True)
            link.symlink_to(following.name)
            link.replace(last)
            if before is not None:
                shutil.rmtree(before)
        else:
            seal_file(following, origin)
            following.replace(last)
    trainer.strategy.barrier("last-checkpoint")
