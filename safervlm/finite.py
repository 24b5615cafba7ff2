"""Training guards: stop on a non-finite loss, gradient or weight, and reject a run that trained nothing."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from safervlm.errors import ArgumentError, RecordError, UserError

SKIPPED_IN_A_ROW = 20
REMEDY = (
    "nothing of this step is kept, checkpoints/last.ckpt stays usable if there is one; lower model.lr or "
    "trainer.gradient_clip_val, train in --trainer.precision 32-true, or check the records of this batch"
)


class NotFiniteError(UserError):
    """Raised if a number is NaN or infinite; during training, the message ends with the step and a remedy.

    Attributes:
        at: End of the message, which the :class:`TrainingGuard` sets.
    """

    at = ""

    def __str__(self) -> str:
        """Returns the message with the step."""
        return f"{super().__str__()}{self.at}"


class NotFiniteRecordError(NotFiniteError, RecordError):
    """Raised if the numbers of a single record are not finite: it fails in a measurement, and ends a training run."""


class TrainingGuard(Callback):
    """Callback that stops a training run on non-finite numbers. The base class of objectives and the judge add it.

    All processes make each decision collectively, so that none blocks waiting for another.

    - A non-finite back-propagated loss, or a non-finite gradient at an optimizer step, stops the run before the step.
      With a loss scaler (float16), which skips steps with such gradients, the run stops after ``SKIPPED_IN_A_ROW``
      consecutive skipped steps.
    - A non-finite validation loss stops the run.
    - Any other :class:`NotFiniteError` in a step, such as that of a judge, gets the step and a remedy in its message.
    - A run without any optimizer step ends with an error.
    """

    def __init__(self) -> None:
        # Whether a loss since the last step was not finite. Kept on the device, so that no step synchronises for it.
        self._loss: Tensor | None = None
        self._skipped = 0  # consecutive skipped steps
        self.skipped = 0  # total of skipped steps
        self._engine_skipped = 0  # skipped steps reported by DeepSpeed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Rejects a run of zero epochs or steps before any weight is loaded.

        Raises:
            ArgumentError: There is nothing to train.
        """
        if stage != "fit":
            return
        for name in ("max_epochs", "max_steps"):
            if getattr(trainer, name) == 0:
                raise ArgumentError(f"trainer.{name}: 0 trains nothing; give at least 1, or omit it")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resets the counters."""
        self._loss, self._skipped, self.skipped, self._engine_skipped = None, 0, 0, 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Records whether the loss is finite."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._loss = bad if self._loss is None else self._loss | bad

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Checks the loss and the gradients before gradient clipping.

        Raises:
            NotFiniteError: The loss or a gradient is not finite, or too many steps in a row were skipped.
        """
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
        """Checks DeepSpeed's gradient norm and skipped steps: DeepSpeed does not expose the gradients themselves.

        Raises:
            NotFiniteError: The norm is not finite, or too many steps in a row were skipped.
        """
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
        """Checks the validation losses, which are the same on all processes.

        Raises:
            NotFiniteError: A validation loss is not finite.
        """
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val") and name.endswith("loss") and not torch.isfinite(value).all():
                raise self._error(trainer, f"{name} is not finite (NaN or infinite)")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rejects a run that made no optimizer step or has non-finite weights."""
        require_optimizer_step(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Adds the step and a remedy to the message of a number that is not finite."""
        if isinstance(exception, NotFiniteError) and not exception.at:
            exception.at = f" {_step(trainer)}"
            if REMEDY not in str(exception):
                exception.at += f"; {REMEDY}"

    @staticmethod
    def _error(trainer: Trainer, what: str) -> NotFiniteError:
        error = NotFiniteError(f"trainer: {what}")
        error.at = f" {_step(trainer)}; {REMEDY}"
        return error


def _step(trainer: Trainer) -> str:
    batch = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return f"at optimizer step {trainer.global_step + 1}, batch {max(batch, 1)}"


def require_optimizer_step(trainer: Trainer, module: LightningModule) -> None:
    """Rejects a module that was not trained. Exports call it first, so the order of callbacks does not matter.

    Args:
        trainer: Trainer of the fit; its global step is compared with the steps skipped by its TrainingGuard.
        module: Trained module.

    Raises:
        ArgumentError: No optimizer step was made.
        NotFiniteError: A trained weight is NaN or infinite.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    skipped = sum(callback.skipped for callback in callbacks if isinstance(callback, TrainingGuard))
    if trainer.global_step <= skipped:  # global_step includes the steps made before the run was resumed
        raise ArgumentError(
            "trainer: no optimizer step was made, so nothing was trained; raise trainer.max_epochs, trainer.max_steps "
            "or trainer.limit_train_batches, or give more data"
        )
    require_finite_weights(module)


def require_finite_weights(module: LightningModule) -> None:
    """Rejects NaN and infinite values among the trainable weights.

    Args:
        module: Module; its parameters with ``requires_grad`` are checked.

    Raises:
        NotFiniteError: A weight is not finite; the message names it.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not all_finite(list(trained.values())):
        bad = next(name for name, parameter in trained.items() if not all_finite([parameter]))
        raise NotFiniteError(f"trainer: the trained weight {bad} is not finite (NaN or infinite); {REMEDY}")


@torch.no_grad()
def require_finite(what: str, *tensors: Tensor) -> None:
    """Rejects NaN and infinite values that a training step has computed.

    Args:
        what: Description of the values for the error message, beginning with the argument.
        *tensors: Tensors of any shape.

    Raises:
        NotFiniteError: A value is not finite.
    """
    if not all_finite(tensors):
        raise NotFiniteError(f"{what} are not finite (NaN or infinite)")


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Returns whether all values of all tensors are finite; synchronises with the device once.

    Args:
        tensors: Tensors of any shape; empty ones are skipped.
    """
    # aminmax returns NaN for a tensor that contains NaN, so the two extremes suffice and no copy is made.
    extremes = [torch.stack(torch.aminmax(tensor)).float() for tensor in tensors if tensor.numel()]
    return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())
