r"""Direct preference optimisation (arXiv:2305.18290): raises the likelihood ratio of chosen to rejected responses.

.. math:: L = -\log\sigma\left(\beta\left[\log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}
    - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}\right]\right) - \alpha\,\frac{1}{N}\sum_t\log\pi(y_{w,t}|x,y_{w,<t})

averaged over the pairs of a batch. The second term, the negative log-likelihood of the chosen response
(``rpo_alpha``, arXiv:2404.19733), has weight 0 in the paper. A small model needs it: the DPO term alone can be
minimised while the likelihood of the chosen response falls, as long as that of the rejected response falls faster.

The reference is the same model without its adapter, so its log-probabilities of a record never change. They are
computed when a record first occurs and cached by its id. The cache is part of the checkpoint, so that a resumed run has
identical numbers.
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
        vlm: The model to align.
        beta: The strength of the regularisation towards the reference model.
        rpo_alpha: The weight of the negative log-likelihood of the chosen response; 0 for plain DPO.
        lr: The peak learning rate. It rises linearly over the warm-up and decays to 0 along a cosine.
        warmup_steps: The number of optimizer steps of the warm-up.
        weight_decay: The weight decay of AdamW.
        seed: The seed of the adapter's initial weights and of the dropout.
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
        """Returns the settings that determine the trained weights (see :meth:`Objective.describe`)."""
        return super().describe() | {"beta": self.beta, "rpo_alpha": self.rpo_alpha}

    def loss(self, batch: Batch, part: str) -> Tensor:
        """Computes the loss of a batch, the mean over its pairs, and logs accuracy and margin of the implicit rewards.

        The accuracy is the share of pairs whose chosen response has the larger implicit reward.

        Args:
            batch: B questions with two completions each: chosen, rejected.
            part: The split, ``train`` or ``val``; the prefix of the logged names.

        Returns:
            The scalar to back-propagate (see :meth:`Objective.global_mean`).
        """
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
            "accuracy": self.global_mean(accuracy.sum(), count),
            "margin": self.global_mean((rewards[:, 0] - rewards[:, 1]).sum(), count),
            "reward_chosen": self.global_mean(rewards[:, 0].sum(), count),
        }.items():
            self.log(f"{part}/{name}", value, prog_bar=name == "accuracy", sync_dist=True, batch_size=len(batch))
        return loss

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Returns the reference model's log-probabilities, from the cache where possible.

        If a question of the batch is not in the cache, the whole batch is scored without the adapter.

        Args:
            batch: B questions with two completions each: chosen, rejected.

        Returns:
            (B, 2) log-probabilities of the chosen and the rejected response.
        """
        ids = [question.id for question in batch.questions]
        if not self.reference.keys() >= set(ids):
            with torch.no_grad():
                computed = pairs(self.vlm.score(batch, adapter="reference")).tolist()
            for name, values in zip(ids, computed, strict=True):
                self.reference.setdefault(name, values)
        return torch.tensor([self.reference[name] for name in ids], device=self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the cached reference log-probabilities of all processes."""
        super().on_save_checkpoint(checkpoint)
        everywhere: list[dict[str, list[float]]] = [self.reference]
        if self.trainer.world_size > 1:
            everywhere = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(everywhere, self.reference)
        checkpoint["reference_logprobs"] = {name: values for part in everywhere for name, values in part.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the cached reference log-probabilities."""
        super().on_load_checkpoint(checkpoint)
        self.reference = dict(checkpoint["reference_logprobs"])


def pairs(scores: Scores) -> Tensor:
    """Sums token log-probabilities to log-probabilities of whole responses.

    Args:
        scores: (2B, T) token log-probabilities; rows alternate between chosen and rejected.

    Returns:
        (B, 2) log-probabilities of the chosen and the rejected response of each pair.
    """
    return scores.logprobs.sum(-1).view(-1, 2)
