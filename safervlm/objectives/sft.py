r"""Supervised fine-tuning: makes the target response likely.

.. math:: L = -\frac{1}{N}\sum_{i}\sum_{t}\log\pi(y_{i,t} \mid x_i, y_{i,<t})

over the N response tokens of a batch (of all processes together); the prompt and the image are conditions and earn no
loss. The paper trains over a 4-bit base (arXiv:2507.11155, its SFT); here the base has the precision of ``vlm.dtype``.
"""

from torch import Tensor

from safervlm.objectives.base import Objective
from safervlm.vlm.base import Batch


class SFT(Objective):
    """Supervised fine-tuning on the aligned response.

    Args:
        vlm: the model to align.
        lr: the highest learning rate; it rises linearly over the warm-up and falls along a cosine to 0.
        warmup_steps: optimizer steps of the warm-up.
        weight_decay: of AdamW.
        seed: the adapter's first weights and the dropout are drawn from it.
    """

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean negative log-likelihood of the batch's response tokens."""
        return self.loss(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same of held-out records."""
        self.loss(batch, "val")

    def loss(self, batch: Batch, part: str) -> Tensor:
        """Computes and logs the loss."""
        scores = self.vlm.score(batch)
        loss = self.global_mean(-scores.logprobs.sum(), scores.mask.sum())
        self.log(f"{part}/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch))
        return loss
