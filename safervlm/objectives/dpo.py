r"""Direct preference optimisation (arXiv:2305.18290): makes the chosen response likelier than the rejected one.

.. math:: L = -\log\sigma\left(\beta\left[\log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}
    - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}\right]\right) - \alpha\,\frac{1}{N}\sum_t\log\pi(y_{w,t}|x,y_{w,<t})

averaged over the pairs of a batch. The second term (``rpo_alpha``, arXiv:2404.19733) is 0 in the paper; a small model
needs it, since the first is content when the chosen response loses likelihood more slowly than the rejected one.

The reference is the same model without its adapter, so its log-probabilities of a record never change: they are
computed when a record is first met and kept by its id, in the checkpoint too (a resumed run has the very same numbers).
"""

from typing import Any

import torch
from torch import Tensor

from safervlm.objectives.base import Objective
from safervlm.objectives.functional import dpo_loss
from safervlm.ranges import in_range
from safervlm.vlm.base import Batch, Scores
from safervlm.vlm.local import LocalVLM


class DPO(Objective):
    """Direct preference optimisation on (chosen, rejected) responses.

    Args:
        vlm: the model to align.
        beta: strength of the pull towards the reference.
        rpo_alpha: weight of the chosen response's own likelihood; 0 for plain DPO.
        lr: the highest learning rate; it rises linearly over the warm-up and falls along a cosine to 0.
        warmup_steps: optimizer steps of the warm-up.
        weight_decay: of AdamW.
        seed: the adapter's first weights and the dropout are drawn from it.
    """

    completions = 2  # chosen, rejected

    def __init__(
        self,
        vlm: LocalVLM,
        beta: float = 0.1,
        rpo_alpha: float = 0.0,
        lr: float = 2e-6,
        warmup_steps: int = 5,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(vlm, lr, warmup_steps, weight_decay, seed)
        in_range("model", above=0, beta=beta)
        in_range("model", least=0, rpo_alpha=rpo_alpha)
        self.beta, self.rpo_alpha = beta, rpo_alpha
        self.reference: dict[str, list[float]] = {}

    def describe(self) -> dict[str, Any]:
        """What of the objective decides the result."""
        return super().describe() | {"beta": self.beta, "rpo_alpha": self.rpo_alpha}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss of the batch's pairs."""
        return self.loss(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same of held-out records."""
        self.loss(batch, "val")

    def loss(self, batch: Batch, part: str) -> Tensor:
        """Computes and logs the loss, with the accuracy and the margin of the implicit rewards."""
        reference = self.reference_logprobs(batch)
        scores = self.vlm.score(batch)
        losses, rewards = dpo_loss(pairs(scores), reference, self.beta)
        count = torch.tensor(len(batch), device=self.device)
        loss = self.global_mean(losses.sum(), count)
        if self.rpo_alpha:
            chosen, tokens = scores.logprobs[0::2], scores.mask[0::2]
            loss = loss - self.rpo_alpha * self.global_mean(chosen.sum(), tokens.sum())
        accuracy = (rewards[:, 0] > rewards[:, 1]).float()
        for name, value in {
            "loss": loss,
            "accuracy": self.global_mean(accuracy.sum(), count),
            "margin": self.global_mean((rewards[:, 0] - rewards[:, 1]).sum(), count),
            "reward_chosen": self.global_mean(rewards[:, 0].sum(), count),
        }.items():
            shown = name in ("loss", "accuracy")
            self.log(f"{part}/{name}", value, prog_bar=shown, sync_dist=True, batch_size=len(batch))
        return loss

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """(B, 2) log-probabilities of the chosen and the rejected response without the adapter."""
        ids = [question.id for question in batch.questions]
        if not self.reference.keys() >= set(ids):
            with torch.no_grad():
                computed = pairs(self.vlm.score(batch, adapter="reference")).tolist()
            for name, values in zip(ids, computed, strict=True):
                self.reference.setdefault(name, values)
        return torch.tensor([self.reference[name] for name in ids], device=self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the reference's numbers, those of all processes."""
        super().on_save_checkpoint(checkpoint)
        everywhere: list[dict[str, list[float]]] = [self.reference]
        if self.trainer.world_size > 1:
            everywhere = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(everywhere, self.reference)
        checkpoint["reference_logprobs"] = {name: values for part in everywhere for name, values in part.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        super().on_load_checkpoint(checkpoint)
        self.reference = dict(checkpoint["reference_logprobs"])


def pairs(scores: Scores) -> Tensor:
    """(2B, T) scores of chosen and rejected, in turn -> (B, 2) log-probabilities of the whole responses."""
    return scores.logprobs.sum(-1).view(-1, 2)
