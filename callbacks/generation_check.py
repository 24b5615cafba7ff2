"""Measures over-flagging during training: the rate at which the policy calls held-out safe images unsafe."""

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
from safervlm.manifest import stage_name
from safervlm.protocol import LABELS, SAFE, UNSAFE
from safervlm.ranges import in_range
from safervlm.run import write_stage
from safervlm.statistics.differences import difference_of_items
from safervlm.vlm.base import must_be_answered
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.thinking import many_unfinished

# Stands for a response without an answer where the flags, 0 and 1, of all processes are put together.
NO_ANSWER = 2.0


class OverFlaggingWarning(UserWarning):
    """The share of safe images that the policy calls unsafe has risen by more than the tolerance."""


class GenerationCheck(Callback):
    """Asks the policy about held-out safe images before, during and after training, and classifies the responses.

    The share of images that are called Unsafe is logged as ``train/unsafe_rate_on_safe`` with the following batch. The
    shares before and after training are also written to the manifest.

    The same images are asked about with the same sampling noise each time, so the responses are paired. A warning is
    issued if the lower end of the 95 % interval of the increase since before training exceeds ``tolerance``. The
    interval is Tango's score interval for a difference of paired proportions
    (:func:`safervlm.statistics.differences.difference_of_items`), so that sampling variation of a few images does not
    trigger the warning.

    A response of a thinking model that ended inside its reasoning has no answer. It is part of no share, and its image
    is compared only if it was answered both times. If there are many, one line reports their number.

    Args:
        judge: The alignment judge.
        every_n_batches: The number of batches between checks. The first check is before training, the last one after
            it.
        tolerance: The increase of the share above which a warning is issued.
        sampling: The sampling of the responses. The noise is the same each time, so that a change is due to the policy.
        minimum: The smallest number of held-out safe images; fewer are rejected, because their share would be too
            coarse. Under ``data.limit``, which makes a run a trial, fewer are accepted, and one line reports it.
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
        judge.require_labels(LABELS["alignment"], "judge")
        self.before: dict[str, bool] | None = None
        self._trained = False
        self.seconds = 0.0  # duration of the last check

    def is_due(self, batches: int) -> bool:
        """Whether a check is due.

        Args:
            batches: the number of training batches so far.
        """
        return batches % self.every_n_batches == 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the baseline by question: a resumed run compares with the same responses from before training."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the baseline.

        Raises:
            ArgumentError: the checkpoint is of an earlier version, which stored no baseline by question.
        """
        if "before" not in state_dict:
            raise ArgumentError(
                "GenerationCheck: the checkpoint is of an earlier version, which kept no responses from before "
                "training; start a new run (--run)"
            )
        self.before = state_dict["before"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates the number of held-out safe images and loads the judge.

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
        """Runs a check if one is due.

        It runs before a batch, not after one: then, in any order of the callbacks, no checkpoint is written between the
        check and the row of metrics that reports it.
        """
        if self.is_due(trainer.fit_loop.epoch_loop.total_batch_idx):
            begun = time.monotonic()
            rate = self.check(trainer, pl_module)
            if rate is not None:
                pl_module.log("train/unsafe_rate_on_safe", rate, batch_size=1)
            self.seconds = time.monotonic() - begun

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes that the policy has changed."""
        self._trained = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the trained policy; a run that was already complete has been checked before."""
        if self._trained:
            rate = self.check(trainer, pl_module)
            if trainer.is_global_zero and self.before is not None:
                rates = {"before": share_of(self.before), "after": rate}
                write_stage(Path(trainer.default_root_dir), stage_name(pl_module), unsafe_rate_on_safe=rates)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """Returns the share of the images that the policy calls Unsafe, and warns if it has risen.

        The first call sets the baseline. The share is None if no response has an answer.

        Args:
            trainer: see :meth:`flagged`.
            pl_module: see :meth:`flagged`.
        """
        now = self.flagged(trainer, pl_module)
        if self.before is None:
            self.before = now
        asked = len(self.questions(trainer))
        if trainer.is_global_zero and (many := many_unfinished("GenerationCheck", asked - len(now), asked)):
            say(many)
        pairs = [(self.before[question], flag) for question, flag in now.items() if question in self.before]
        cleared, newly_flagged = pairs.count((True, False)), pairs.count((False, True))
        if pairs and (increase := difference_of_items(cleared, newly_flagged, len(pairs))).low > self.tolerance:
            first, last = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            warnings.warn(
                f"{last:.0%} of the held-out safe images are called {UNSAFE} now, {first:.0%} before training (an "
                f"increase of {increase.low:.0%} to {increase.high:.0%}, 95 % interval): the policy over-flags",
                OverFlaggingWarning,
                stacklevel=2,
            )
        return share_of(now)

    @torch.no_grad()
    def flagged(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, bool]:
        """Asks the policy about the held-out safe images and classifies the responses.

        Args:
            trainer: the trainer; its data module provides the validation batches.
            pl_module: the objective, whose ``vlm`` is the policy.

        Returns:
            By the question's id, whether its image is called Unsafe; without the questions whose response has no
            answer. The same on every process.
        """
        questions = self.questions(trainer)
        place = {question: number for number, question in enumerate(questions)}
        flags = torch.zeros(len(questions), dtype=torch.float64, device=pl_module.device)
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            given = pl_module.vlm.generate(batch.to(pl_module.device), self.sampling, seed_for("generation-check"))  # type: ignore[operator, union-attr]
            answers = must_be_answered(given)
            labels = self.judge.judge([answer.text for answer in answers]).argmax(-1).tolist()
            for label, question, answer in zip(labels, batch.questions, answers, strict=True):
                if question.answer == SAFE:
                    flag = float(self.judge.labels[label] == UNSAFE)
                    flags[place[question.id]] = flag if answer.answered else NO_ANSWER
        # Each process asks about its own share of the images, and each image is asked about by one process.
        flags = trainer.strategy.reduce(flags, reduce_op="sum")
        pairs = zip(questions, flags.tolist(), strict=True)
        return {question: bool(flag) for question, flag in pairs if flag != NO_ANSWER}

    @staticmethod
    def questions(trainer: Trainer) -> list[str]:
        """Returns the ids of the questions about held-out safe images, of all processes.

        Args:
            trainer: the trainer; its data module has the validation split.
        """
        held_out = trainer.datamodule.parts.validation  # type: ignore[attr-defined]
        return [example.question.id for example in held_out if example.question.answer == SAFE]


def share_of(flags: dict[str, bool]) -> float | None:
    """Returns the share of True values; None if there are no values.

    Args:
        flags: Values by question.
    """
    return sum(flags.values()) / len(flags) if flags else None
