"""Judged answers while training: does the policy start to call everything unsafe?"""

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from safervlm.errors import ArgumentError, RecordError
from safervlm.hashing import seed_for
from safervlm.io.tables import say
from safervlm.judging.classifier import Judge
from safervlm.protocol import LABELS, SAFE, UNSAFE
from safervlm.ranges import in_range
from safervlm.run import stage_name, write_stage
from safervlm.statistics.differences import difference_of_items
from safervlm.vlm.sampling import Sampling


class OverFlaggingWarning(UserWarning):
    """The policy calls more safe images unsafe than the base model did."""


class GenerationCheck(Callback):
    """Asks the policy about held-out safe images before, during and after training, and has the judge classify them.

    The share that is called Unsafe is logged as ``train/unsafe_rate_on_safe`` with the batch that comes next; those
    before and after training also stand in the manifest.

    The same images are asked with the same noise each time, so the answers are paired. A warning is given when the
    lower end of the 95 % interval of the increase since before training exceeds ``tolerance``: Tango's score interval
    for a difference of paired proportions (:func:`safervlm.statistics.differences.difference_of_items`), so that
    sampling variation of a few images does not trigger it.

    Args:
        judge: the alignment judge.
        every_n_batches: how often; the first time before training, the last time after it.
        tolerance: increase of the share that is not warned of.
        sampling: how answers are sampled; the same noise each time, so a change is the policy's.
        minimum: fewer held-out safe images than this are rejected: their share would be too coarse. Under
            ``data.limit``, which makes a run a trial, fewer are taken, and one line says so.
    """

    def __init__(
        self,
        judge: Judge,
        every_n_batches: int = 50,
        tolerance: float = 0.05,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        minimum: int = 100,
    ) -> None:
        in_range(least=1, every_n_batches=every_n_batches, minimum=minimum)
        in_range(least=0, below=1, tolerance=tolerance)
        self.judge, self.every_n_batches, self.tolerance = judge, every_n_batches, tolerance
        self.sampling, self.minimum = sampling, minimum
        judge.must_tell(LABELS["alignment"], "judge")
        self.before: dict[str, bool] | None = None
        self._trained = False
        self.seconds = 0.0  # that the last check took

    def is_due(self, batches: int) -> bool:
        """Whether it measures after so many batches."""
        return batches % self.every_n_batches == 0

    def state_dict(self) -> dict[str, Any]:
        """Which images were called Unsafe before training, by question: a resumed run compares with the same ones."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back.

        Raises:
            ArgumentError: the checkpoint has it not, image by image.
        """
        if "before" not in state_dict:
            raise ArgumentError(
                "GenerationCheck: the checkpoint is of an earlier version, which kept no answers from before training; "
                "start a new run (--run)"
            )
        self.before = state_dict["before"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rejects too few images, and readies the judge.

        Raises:
            RecordError: fewer than ``minimum`` safe images are held out, or under ``data.limit`` none.
        """
        count = len(self.questions(trainer))
        limit = getattr(trainer.datamodule, "limit", None)  # type: ignore[attr-defined]
        if count < (self.minimum if limit is None else 1):
            raise RecordError(
                f"GenerationCheck: {count} held-out safe images, {self.minimum} are needed; hold out more "
                "(data.validation_fraction) or leave the callback out"
            )
        if count < self.minimum and trainer.is_global_zero:
            say(
                f"GenerationCheck: {count} held-out safe images under data.limit {limit}: the share that is called "
                f"{UNSAFE} is coarse (without a limit {self.minimum} are needed)"
            )
        self.judge.configure_model()
        self.judge.to(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measures where it is time to.

        Before a batch, not after one: whatever the order of the callbacks, no checkpoint stands between the measurement
        and the row of metrics that tells it.
        """
        if self.is_due(trainer.fit_loop.epoch_loop.total_batch_idx):
            begun = time.monotonic()
            pl_module.log("train/unsafe_rate_on_safe", self.check(trainer, pl_module), batch_size=1)
            self.seconds = time.monotonic() - begun

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes that there is something new to measure."""
        self._trained = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the policy that training leaves; a run that was complete already has been measured."""
        if self._trained:
            rate = self.check(trainer, pl_module)
            if trainer.is_global_zero and self.before is not None:
                rates = {"before": share_of(self.before), "after": rate}
                write_stage(Path(trainer.default_root_dir), stage_name(pl_module), unsafe_rate_on_safe=rates)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """The share of the images that is called Unsafe now; warns when it has risen."""
        now = self.flagged(trainer, pl_module)
        if self.before is None:
            self.before = now
        lost = sum(self.before[question] and not flag for question, flag in now.items())
        gained = sum(flag and not self.before[question] for question, flag in now.items())
        increase = difference_of_items(lost, gained, len(now))
        if increase.low > self.tolerance:
            warnings.warn(
                f"{share_of(now):.0%} of the held-out safe images are called {UNSAFE} now, {share_of(self.before):.0%} "
                f"before training (an increase of {increase.low:.0%} to {increase.high:.0%}, 95 % interval): the "
                "policy over-flags",
                OverFlaggingWarning,
                stacklevel=2,
            )
        return share_of(now)

    @torch.no_grad()
    def flagged(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, bool]:
        """Whether each held-out safe image is called Unsafe, by its question; all of them, on every process."""
        questions = self.questions(trainer)
        place = {question: number for number, question in enumerate(questions)}
        flags = torch.zeros(len(questions), dtype=torch.float64, device=pl_module.device)
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            answers = pl_module.vlm.generate(batch.to(pl_module.device), self.sampling, seed_for("generation-check"))  # type: ignore[operator, union-attr]
            labels = self.judge.judge([answer.text for answer in answers]).argmax(-1).tolist()
            for label, question in zip(labels, batch.questions, strict=True):
                if question.answer == SAFE:
                    flags[place[question.id]] = float(self.judge.labels[label] == UNSAFE)
        # A process asks about its part of the images, each image is asked about by one.
        flags = trainer.strategy.reduce(flags, reduce_op="sum")
        return {question: bool(flag) for question, flag in zip(questions, flags.tolist(), strict=True)}

    @staticmethod
    def questions(trainer: Trainer) -> list[str]:
        """The ids of the questions about held-out safe images, of all processes."""
        held_out = trainer.datamodule.parts.validation  # type: ignore[attr-defined]
        return [example.question.id for example in held_out if example.question.answer == SAFE]


def share_of(flags: dict[str, bool]) -> float:
    """The share of True."""
    return sum(flags.values()) / len(flags)
