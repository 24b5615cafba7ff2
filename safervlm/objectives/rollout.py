"""The data of a rollout of an on-policy objective."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from safervlm.vlm.base import Batch, Generation


@dataclass
class Sampled:
    """A batch with its responses and their rewards; B responses, T tokens of the longest one.

    Attributes:
        batch: The question of each response, with encoded images.
        answers: The B generated responses.
        columns: By name, (B, T) tensors of :meth:`safervlm.objectives.on_policy.OnPolicy.columns`, 0 at padding.
        rewards: (B,) rewards of the responses.
        costs: (B,) 1 for a response that calls a safe image Unsafe, else 0.
        multiplier: The Lagrange multiplier of the costs; 0 without a budget for over-flagging.
        metrics: Scalar means over this process's responses, by name.
    """

    batch: Batch
    answers: list[Generation]
    columns: dict[str, Tensor]
    rewards: Tensor
    costs: Tensor
    multiplier: float
    metrics: dict[str, Tensor]


@dataclass
class Rollout:
    """The inputs of the updates.

    Attributes:
        batch: See :class:`Sampled`, as are answers and metrics.
        mask: (B, T) True at response tokens.
        logprobs: (B, T) log-probabilities under the policy that generated the responses.
        advantages: The advantage of each token (B, T) or of each response (B, 1).
    """

    batch: Batch
    answers: list[Generation]
    mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    metrics: dict[str, Tensor]

    def select(self, rows: Tensor) -> Batch:
        """Returns the batch of some responses, for :meth:`safervlm.vlm.local.LocalVLM.score`.

        Args:
            rows: (M,) indices of the responses.
        """
        return self.batch.select(rows, [answer.token_ids for answer in self.answers])


def answer_length(response: Generation, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the number of tokens of an answer, without its reasoning; 0 if there is no answer.

    Args:
        response: A response.
        tokenizer: The model's tokenizer.
    """
    if not response.answered:
        return 0
    if not response.reasoning:
        return len(response.token_ids)
    ids = tokenizer(response.text, add_special_tokens=False).input_ids
    return min(len(ids) + (response.finish_reason == "stop"), len(response.token_ids))


def logprob_differences(scored: Tensor, answers: Sequence[Generation]) -> dict[str, Tensor]:
    """Compares the log-probabilities of scoring with those of generating; rounding makes them differ.

    The importance ratios are computed from those of scoring. A large difference means that the responses were sampled
    from another distribution than the one that is optimised.

    Args:
        scored: (N,) log-probabilities of all tokens of the responses, one response after the other.
        answers: The responses.

    Returns:
        The mean and the 99th percentile of the absolute differences, in nats, of this process. Empty if the family
        does not record log-probabilities when it generates.
    """
    generated = [value for answer in answers for value in answer.token_logprobs or ()]
    if len(generated) != len(scored):
        return {}
    gap = (scored.double() - torch.tensor(generated, dtype=torch.float64, device=scored.device)).abs()
    return {"logprob_difference": gap.mean(), "logprob_difference_p99": gap.quantile(0.99)}
