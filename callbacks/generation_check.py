"""Judged answers while training: does the policy start to call everything unsafe?"""

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from safervlm.errors import ArgumentError, RecordError
from safervlm.judge import Judge
from safervlm.protocol import LABELS, SAFE, UNSAFE
from safervlm.records import seed_for
from safervlm.run import stage_name, write_stage
from safervlm.vlm.sampling import Sampling


class OverFlaggingWarning(UserWarning):
    """The policy calls more safe images unsafe than the base model did."""


class GenerationCheck(Callback):
    """Asks the policy about held-out safe images, before training and while it goes on, and lets the judge read.

    The share that is called Unsafe is logged as ``train/unsafe_rate_on_safe`` with the batch that comes next; those
    before and after training also stand in the manifest. A warning is given when it exceeds the one before training by
    more than ``tolerance``.

    Args:
        judge: the alignment judge.
        every_n_batches: how often; the first time before training, the last time after it.
        tolerance: rise of the rate that is passed over.
        sampling: how answers are drawn; the same noise each time, so a change is the policy's.
        minimum: fewer held-out safe images than this are refused: their rate would be too coarse.
    """

    def __init__(
        self,
        judge: Judge,
        every_n_batches: int = 50,
        tolerance: float = 0.05,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        minimum: int = 100,
    ) -> None:
        if every_n_batches < 1:
            raise ArgumentError(f"every_n_batches: at least 1, got {every_n_batches}")
        self.judge, self.every_n_batches, self.tolerance = judge, every_n_batches, tolerance
        self.sampling, self.minimum = sampling, minimum
        judge.must_tell(LABELS["alignment"], "judge")
        self.first: float | None = None
        self._trained = False

    def state_dict(self) -> dict[str, Any]:
        """The rate before training: a continued run compares with the same one."""
        return {"first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self.first = state_dict["first"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses too few images, and readies the judge."""
        safe = [e for e in trainer.datamodule.parts.validation if e.question.answer == SAFE]  # type: ignore[attr-defined]
        if len(safe) < self.minimum:
            raise RecordError(
                f"GenerationCheck: {len(safe)} held-out safe images, {self.minimum} are needed; hold out more "
                "(data.validation_fraction) or leave the callback out"
            )
        self.judge.configure_model()
        self.judge.to(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measures where it is time to.

        Before a batch, not after one: whatever the order of the callbacks, no checkpoint stands between the measurement
        and the row of metrics that tells it.
        """
        if trainer.fit_loop.epoch_loop.total_batch_idx % self.every_n_batches == 0:
            pl_module.log("train/unsafe_rate_on_safe", self.check(trainer, pl_module), batch_size=1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes that there is something new to measure."""
        self._trained = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the policy that training leaves; a run that was complete already has been measured."""
        if self._trained:
            rate = self.check(trainer, pl_module)
            if trainer.is_global_zero:
                rates = {"before": self.first, "after": rate}
                write_stage(Path(trainer.default_root_dir), stage_name(pl_module), unsafe_rate_on_safe=rates)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """The rate now; warns when it has risen."""
        rate = self.rate(trainer, pl_module)
        if self.first is None:
            self.first = rate
        if rate > self.first + self.tolerance:
            warnings.warn(
                f"{rate:.0%} of the held-out safe images are called {UNSAFE} now, {self.first:.0%} before training: "
                "the policy over-flags",
                OverFlaggingWarning,
                stacklevel=2,
            )
        return rate

    @torch.no_grad()
    def rate(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """The share of the held-out safe images that the policy calls Unsafe, over all processes."""
        flagged = total = 0
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            answers = pl_module.vlm.generate(batch.to(pl_module.device), self.sampling, seed_for("generation-check"))  # type: ignore[operator, union-attr]
            labels = self.judge.judge([answer.text for answer in answers]).argmax(-1).tolist()
            safe = [
                self.judge.labels[label] == UNSAFE
                for label, question in zip(labels, batch.questions, strict=True)
                if question.answer == SAFE
            ]
            flagged, total = flagged + sum(safe), total + len(safe)
        counts = torch.tensor([flagged, total], dtype=torch.float64, device=pl_module.device)
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        return float(counts[0] / counts[1])
