"""Base class of the training objectives: one VLM, one optimizer, adapter-only checkpoints, exact resume."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import AdamW
from transformers import get_cosine_schedule_with_warmup

from safervlm.data.module import SaferData
from safervlm.data.training_checks import require_trainable
from safervlm.errors import ArgumentError, RecordError
from safervlm.finite import TrainingGuard
from safervlm.hashing import seed_for
from safervlm.io.checkpoints import require_matching_weights
from safervlm.io.images import ImageSettings
from safervlm.ranges import in_range
from safervlm.vlm.base import Batch, Collator
from safervlm.vlm.local import LocalVLM
from safervlm.vlm.lora import Adapter


class Objective(L.LightningModule):
    """Base class of training objectives.

    A new objective is one file with a subclass that implements :meth:`loss`, which returns a plain scalar. The base
    class does the rest: it logs the loss, back-propagates it, validates with it on held-out data, stops a run
    whose loss, gradients or weights are not finite, and writes checkpoints from which the training resumes. The rules:

    - ``completions`` is the number of completions that each example of the data must provide.
    - ``adapters`` are the names of the adapters to train.
    - A subclass with further settings adds them to :meth:`describe`, so that a run is not resumed with different ones.
    - A subclass that does more in a step than one loss, as PPO and GRPO do, overrides ``training_step`` instead. It is
      not validated unless it also overrides ``validation_step``.

    Args:
        vlm: The model to align.
        lr: The peak learning rate. It rises linearly over the warm-up and decays to 0 along a cosine.
        warmup_steps: The number of optimizer steps of the warm-up.
        weight_decay: The weight decay of AdamW.
        seed: The seed of the adapter's initial weights and of the dropout.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Removes the validation step of a subclass without a loss function: Lightning would otherwise run it."""
        super().__init_subclass__(**kwargs)
        if cls.loss is Objective.loss and cls.validation_step is Objective.validation_step:
            cls.validation_step = L.LightningModule.validation_step  # type: ignore[assignment]

    adapters: tuple[Adapter, ...] = ("policy",)
    completions = 1  # that each example of the data must provide

    def __init__(
        self, vlm: LocalVLM, lr: float = 3e-5, warmup_steps: int = 5, weight_decay: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        in_range("model", above=0, lr=lr)
        in_range("model", least=0, warmup_steps=warmup_steps, weight_decay=weight_decay)
        self.vlm, self.lr, self.warmup_steps, self.weight_decay, self.seed = vlm, lr, warmup_steps, weight_decay, seed
        # Frozen weights are not part of checkpoints; on_load_checkpoint checks the trained ones strictly.
        self.strict_loading = False

    @property
    def collator(self) -> Collator:
        """The collator of the VLM, which builds the batches; the command line passes it to the data module."""
        return self.vlm.collator

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine the trained weights, as JSON values; they are stored in the manifest."""
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "vlm": self.vlm.describe(),
            "lora": self.vlm.lora.describe(),
            "lr": self.lr,
            "warmup_steps": self.warmup_steps,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
        }

    def loss(self, batch: Batch, part: str) -> Tensor:
        """Computes the loss of a batch; implemented by subclasses.

        Args:
            batch: B questions with the completions of their examples, for :meth:`LocalVLM.score`.
            part: The split, ``train`` or ``val``; the prefix of names that the method logs itself.

        Returns:
            A scalar tensor with gradient, such as the mean over the completions of the batch. With several processes,
            the gradients of their losses are averaged with equal weight; :meth:`global_mean` weights each token or
            example equally, also where the batches differ in size. With ``accumulate_grad_batches`` the losses of the
            batches of a step are averaged with equal weight.

        Raises:
            NotImplementedError: The subclass has neither this method nor a ``training_step``.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither a loss nor a training_step")

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Computes and logs the training loss."""
        return self.logged_loss(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Computes and logs the validation loss."""
        self.logged_loss(batch, "val")

    def logged_loss(self, batch: Batch, part: str) -> Tensor:
        """Computes the loss of a batch and logs it as ``{part}/loss``, averaged over all processes.

        Args:
            batch: See :meth:`loss`.
            part: The split, ``train`` or ``val``.

        Returns:
            The scalar to back-propagate.

        Raises:
            ArgumentError: The loss is not a scalar tensor, or has no gradient in training.
        """
        loss = self.loss(batch, part)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ArgumentError(
                f"model: the loss of {type(self).__name__} is {found}; return a scalar tensor, the mean"
            )
        if part == "train" and not loss.requires_grad:
            raise ArgumentError(
                f"model: the loss of {type(self).__name__} has no gradient; compute it from the scores of the policy, "
                "without detach, item or no_grad"
            )
        loss = loss.reshape(())
        self.log(f"{part}/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch))
        return loss

    def configure_callbacks(self) -> list[L.Callback]:
        """Adds the guard that stops training if a loss, gradient or weight is not finite."""
        return [TrainingGuard()]

    def setup(self, stage: str) -> None:
        """Validates, before any weight is loaded, the completions that this objective expects, every text and image.

        Raises:
            ArgumentError: The first training or validation example has another number of completions, or they would
                train a thinking model not to think.
            RecordError: The same, where the completions are in a file of the user (the message names line and field);
                or the model can't process a text, or an image is damaged or too large. Training would end halfway,
                and could not be resumed with another record in place of the invalid one.
        """
        if stage == "fit" and self.completions:
            self.vlm.require_thinking_preserved()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, SaferData):
            return
        for validation, part in ((False, data.parts.train), (True, data.parts.validation)):
            given = len(part[0].completions) if part else self.completions
            if given == self.completions:
                continue
            name = type(self).__name__
            if place := data.completions_at(validation):
                remedy = "; a label without texts is for PPO and GRPO" if not given else ""
                raise RecordError(f"{place} has {given} texts, {name} takes {self.completions} in each record{remedy}")
            raise ArgumentError(
                f"data: {type(data).__name__} provides {given} completions per record, {name} needs "
                f"{self.completions}; use the data of its recipe in configs/"
            )
        asked = (data.parts.train if stage == "fit" else []) + data.parts.validation
        require_trainable(asked, self.collator, getattr(self.vlm, "images", ImageSettings()))

    def configure_model(self) -> None:
        """Loads the base weights and adds newly initialised adapters."""
        self.vlm.load(train=self.adapters, seed=self.seed)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns AdamW over the trained parameters, with a linear warm-up and a cosine decay to 0.

        The schedule spans the whole training. If training is extended, it continues on the schedule of the new length.
        """
        optimizer = AdamW(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            lr=self.lr,
            weight_decay=self.weight_decay,
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, self.schedule_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def schedule_steps(self) -> int:
        """Returns the number of steps of the learning-rate schedule in the whole run.

        Raises:
            ArgumentError: The run has no end, so the schedule has no length.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ArgumentError("trainer.max_epochs: the learning rate falls to 0 at the end, so the run needs one")
        return int(steps)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds the dropout by (seed, epoch, step, rank), so that a resumed run needs no stored generator state."""
        torch.manual_seed(seed_for(self.seed, "step", self.current_epoch, batch_idx, self.global_rank))

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Sums a tensor over all processes, without gradient.

        Args:
            value: The tensor of this process; it has the same shape on all processes.

        Returns:
            The sum, of the shape of ``value``, detached.
        """
        if self.trainer.world_size == 1:
            return value.detach()
        return self.all_gather(value.detach()).sum(0)  # type: ignore[union-attr]

    def global_mean(self, total: Tensor, count: Tensor) -> Tensor:
        """Computes the mean over the batches of all processes, in the form that each process back-propagates.

        Gradients are averaged over the processes, whose batches differ in size; a mean of the processes' means would
        weight their tokens differently.

        Args:
            total: Scalar sum over this process's batch.
            count: Scalar number of summands of this process (tokens or examples).

        Returns:
            ``total * world_size / global count``. The average of this value over the processes is the global mean.
        """
        return total * self.trainer.world_size / self.sum_over_ranks(count).clamp(min=1)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns only the trainable parameters: the LoRA adapters, and the value head of PPO."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the names of the trained weights; DeepSpeed stores the weights themselves outside this dictionary."""
        checkpoint["trained"] = list(self.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rejects a checkpoint whose weights are not exactly the trained ones.

        Non-strict loading would skip the difference without a message.

        Raises:
            RecordError: A weight is missing, unknown, or of another shape, or the checkpoint was not written by an
                objective.
        """
        require_matching_weights(checkpoint, self.state_dict())
