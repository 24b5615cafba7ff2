r"""Supervised fine-tuning: minimises the negative log-likelihood of the target response.

.. math:: L = -\frac{1}{N}\sum_{i}\sum_{t}\log\pi(y_{i,t} \mid x_i, y_{i,<t})

where N is the number of response tokens of the global batch (all processes together). The tokens of the prompt and of
the image are conditioned on and do not contribute to the loss. The paper (arXiv:2507.11155) trains its SFT adapter on a
base model quantised to 4 bits; here the base model has the precision ``vlm.dtype``.
"""

from torch import Tensor

from safervlm.objectives.base import Objective
from safervlm.vlm.base import Batch


class SFT(Objective):
    """Supervised fine-tuning on the aligned response (the one completion of each example).

    Args:
        vlm: The model to align.
        lr: The peak learning rate. It rises linearly over the warm-up and decays to 0 along a cosine.
        warmup_steps: The number of optimizer steps of the warm-up.
        weight_decay: The weight decay of AdamW.
        seed: The seed of the adapter's initial weights and of the dropout.
    """

    def loss(self, batch: Batch, part: str) -> Tensor:
        """Computes the loss of a batch: the mean negative log-likelihood of the response tokens.

        Args:
            batch: B questions with one completion each.
            part: Unused.

        Returns:
            The scalar to back-propagate (see :meth:`Objective.global_mean`).
        """
        scores = self.vlm.score(batch)
        return self.global_mean(-scores.logprobs.sum(), scores.mask.sum())
