"""What all objectives share: one VLM, one optimizer, adapter-only checkpoints, exact resume."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import AdamW
from transformers import get_cosine_schedule_with_warmup

from safervlm.data.module import SaferData
from safervlm.errors import ArgumentError
from safervlm.finite import TrainingGuard
from safervlm.hashing import seed_for
from safervlm.io.seals import must_fit
from safervlm.ranges import in_range
from safervlm.vlm.base import Batch, Collator
from safervlm.vlm.local import LocalVLM
from safervlm.vlm.lora import Adapter


class Objective(L.LightningModule):
    """Says, from a batch, what the loss is; a new objective is one file with one ``training_step``.

    Args:
        vlm: the model to align.
        lr: the highest learning rate; it rises linearly over the warm-up and falls along a cosine to 0.
        warmup_steps: optimizer steps of the warm-up.
        weight_decay: of AdamW.
        seed: the adapter's first weights and the dropout are drawn from it.
    """

    adapters: tuple[Adapter, ...] = ("policy",)
    completions = 1  # that a record of the data has to have

    def __init__(
        self, vlm: LocalVLM, lr: float = 3e-5, warmup_steps: int = 5, weight_decay: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        in_range("model", above=0, lr=lr)
        in_range("model", least=0, warmup_steps=warmup_steps, weight_decay=weight_decay)
        self.vlm, self.lr, self.warmup_steps, self.weight_decay, self.seed = vlm, lr, warmup_steps, weight_decay, seed
        # Everything frozen stays out of checkpoints; on_load_checkpoint is strict about the rest.
        self.strict_loading = False

    @property
    def collator(self) -> Collator:
        """Makes the batches; the CLI hands it to the data."""
        return self.vlm.collator

    def describe(self) -> dict[str, Any]:
        """What of the objective decides the result."""
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "vlm": self.vlm.describe(),
            "lora": vars(self.vlm.lora),
            "lr": self.lr,
            "warmup_steps": self.warmup_steps,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
        }

    def configure_callbacks(self) -> list[L.Callback]:
        """Stops the run where a number is not finite, whatever the objective."""
        return [TrainingGuard()]

    def setup(self, stage: str) -> None:
        """Refuses another objective's data, before any weight is read."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        examples = [*data.parts.train[:1], *data.parts.validation[:1]] if isinstance(data, SaferData) else []
        for example in examples:
            if len(example.completions) != self.completions:
                raise ArgumentError(
                    f"data: {type(data).__name__} gives {len(example.completions)} completions a record, "
                    f"{type(self).__name__} takes {self.completions}; use the data of its recipe in configs/"
                )

    def configure_model(self) -> None:
        """Reads the base weights and adds new adapters."""
        self.vlm.load(train=self.adapters, seed=self.seed)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over what is trained, cosine schedule with a warm-up."""
        optimizer = AdamW(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            lr=self.lr,
            weight_decay=self.weight_decay,
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, self.schedule_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def schedule_steps(self) -> int:
        """How often the schedule steps in the whole run."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ArgumentError("trainer.max_epochs: the learning rate falls to 0 at the end, so the run needs one")
        return int(steps)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draws a step's dropout from (seed, epoch, step, rank): nothing to store, everything to resume."""
        torch.manual_seed(seed_for(self.seed, "step", self.current_epoch, batch_idx, self.global_rank))

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum over all processes, without gradient."""
        if self.trainer.world_size == 1:
            return value.detach()
        return self.all_gather(value.detach()).sum(0)  # type: ignore[union-attr]

    def global_mean(self, total: Tensor, count: Tensor) -> Tensor:
        """A mean over the batches of all processes, in the form that each of them has to back-propagate.

        Gradients are averaged over the processes, whose batches differ in size: a mean of means would weigh their
        tokens differently.

        Args:
            total: this process's sum.
            count: what it is a sum of.
        """
        return total * self.trainer.world_size / self.sum_over_ranks(count).clamp(min=1)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained weights alone."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes which weights are trained: DeepSpeed keeps the weights themselves elsewhere."""
        checkpoint["trained"] = list(self.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rejects a checkpoint whose weights are not exactly the trained ones; loading itself would say nothing."""
        must_fit(checkpoint, self.state_dict())
