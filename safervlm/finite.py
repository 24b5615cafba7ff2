"""Training stops where a loss, a gradient or a weight is not finite, and where nothing was trained."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from safervlm.errors import ArgumentError, UserError

SKIPPED_IN_A_ROW = 20
REMEDY = (
    "nothing of this step is kept, checkpoints/last.ckpt stays usable; lower model.lr or trainer.gradient_clip_val, "
    "train in --trainer.precision 32-true, or look at the records of this batch"
)


class NotFiniteError(UserError):
    """A number of the training is NaN or infinite."""


class TrainingGuard(Callback):
    """Watches every training: the base class of the objectives, and the judge, bring it along.

    All processes decide together, so that none waits for another.

    - A loss that is back-propagated, or a gradient at an optimizer step, that is not finite stops the run before the
      step. With a loss scaler (float16), which itself skips steps with such gradients, ``SKIPPED_IN_A_ROW`` skipped
      steps in a row stop it.
    - A loss of held-out records that is not finite stops it.
    - A run without any optimizer step ends with an error.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None  # whether one since the last step was not finite; no number leaves its device
        self._skipped = 0  # in a row
        self.skipped = 0  # in all
        self._engine_skipped = 0  # what DeepSpeed says to have skipped

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Rejects a run of no steps, before any weight is read."""
        if stage != "fit":
            return
        for name in ("max_epochs", "max_steps"):
            if getattr(trainer, name) == 0:
                raise ArgumentError(f"trainer.{name}: 0 trains nothing; give at least 1, or leave it out")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to count."""
        self._loss, self._skipped, self.skipped, self._engine_skipped = None, 0, 0, 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Notes whether the loss is finite."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._loss = bad if self._loss is None else self._loss | bad

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Looks at the loss and the gradients, before they are clipped."""
        bad_loss = self._loss is not None and bool(self._loss)
        self._loss = None
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        bad_gradient = not all_finite([each.grad for each in parameters if each.grad is not None])
        strategy = trainer.strategy
        if strategy.reduce_boolean_decision(bad_loss, all=False):
            raise self._error(trainer, "the loss is not finite (NaN or infinite)")
        if not strategy.reduce_boolean_decision(bad_gradient, all=False):
            self._skipped = 0
            return
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            raise self._error(trainer, "a gradient is not finite (NaN or infinite)")
        self._skip(trainer)

    def _skip(self, trainer: Trainer) -> None:
        self._skipped, self.skipped = self._skipped + 1, self.skipped + 1
        if self._skipped >= SKIPPED_IN_A_ROW:
            raise self._error(trainer, f"the loss scaler skipped {self._skipped} optimizer steps in a row")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """DeepSpeed has its gradients to itself: it says what their norm was, and how many steps it skipped."""
        if not isinstance(trainer.strategy, DeepSpeedStrategy):
            return
        engine = trainer.strategy.deepspeed_engine
        skipped = int(getattr(engine, "skipped_steps", 0))
        if skipped > self._engine_skipped:
            self._engine_skipped = skipped
            self._skip(trainer)
            return
        self._skipped = 0
        norm = engine.get_global_grad_norm()
        if norm is not None and not math.isfinite(float(norm)):
            raise self._error(trainer, "the gradients' norm is not finite (NaN or infinite)")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the losses of held-out records, the same on all processes."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val") and name.endswith("loss") and not torch.isfinite(value).all():
                raise self._error(trainer, f"{name} is not finite (NaN or infinite)")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rejects what was not trained."""
        must_be_trained(trainer, pl_module)

    @staticmethod
    def _error(trainer: Trainer, what: str) -> NotFiniteError:
        batch = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        return NotFiniteError(
            f"trainer: {what} at optimizer step {trainer.global_step + 1}, batch {max(batch, 1)}; {REMEDY}"
        )


def must_be_trained(trainer: Trainer, module: LightningModule) -> None:
    """Rejects to take a module for trained: what an export calls first, whatever the order of the callbacks.

    Raises:
        ArgumentError: no optimizer step was made.
        NotFiniteError: a trained weight is NaN or infinite.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    skipped = sum(callback.skipped for callback in callbacks if isinstance(callback, TrainingGuard))
    if trainer.global_step <= skipped:  # steps of before a run was resumed are among the global ones
        raise ArgumentError(
            "trainer: no optimizer step was made, so nothing was trained; raise trainer.max_epochs, trainer.max_steps "
            "or trainer.limit_train_batches, or give more data"
        )
    must_have_finite_weights(module)


def must_have_finite_weights(module: LightningModule) -> None:
    """Rejects NaN and infinities among the trained weights.

    Raises:
        NotFiniteError: names the weight.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not all_finite(list(trained.values())):
        bad = next(name for name, parameter in trained.items() if not all_finite([parameter]))
        raise NotFiniteError(f"trainer: the trained weight {bad} is not finite (NaN or infinite); {REMEDY}")


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no number is NaN or infinite; the device is waited for once."""
    # NaN is the extreme of whatever holds one; nothing is copied.
    extremes = [torch.stack(torch.aminmax(tensor)).float() for tensor in tensors if tensor.numel()]
    return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())
