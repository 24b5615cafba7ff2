"""Proximal policy optimisation (arXiv:1707.06347) rewarded by a response judge, as in arXiv:2507.11155.

A batch is a rollout (:class:`OnPolicy`) with one response per question:

1. The value function scores the responses, too.
2. ``token_rewards`` (functional.py) adds the KL penalty at every token to the paper's reward at the last one.
3. GAE computes the advantages. Returns are advantages + values; the advantages are then whitened over the batch.
4. The updates minimise ``L_policy + c_v L_value - c_e H``, averaged over the response tokens of a mini-batch.

Differences from the published implementation: responses are not padded to ``response_length``; equal judge scores are
normalised to 0.5, not 0/0; scoring excludes the tokens that sampling suppresses; the adapters have no dropout; the base
model has the precision ``vlm.dtype`` rather than 4 bits.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from safervlm.finite import require_finite
from safervlm.judging.classifier import Judge
from safervlm.objectives.functional import (
    approx_kl,
    constrained,
    explained_variance,
    gae,
    importance_ratio,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
    whiten,
)
from safervlm.objectives.on_policy import OnPolicy
from safervlm.objectives.rollout import Rollout
from safervlm.ranges import in_range
from safervlm.vlm.base import Batch, Scores
from safervlm.vlm.local import LocalVLM


@dataclass
class ValuedRollout(Rollout):
    """A rollout with a value function.

    Attributes:
        values: (B, T) value of the state before each token.
        returns: (B, T) advantages before whitening, plus values.
    """

    values: Tensor
    returns: Tensor


class PPO(OnPolicy):
    """Proximal policy optimisation, rewarded by an alignment judge.

    Args:
        vlm: The model to align.
        judge: The alignment judge. Its log-probability of the image's label is the reward of a response; it is frozen.
        value_on: Where the value head (a linear layer) is placed. ``adapter``: on a separate LoRA adapter, as published
            (two forward passes per step). ``policy``: on the policy's hidden states, detached (one forward pass).
        kl_coef: The KL coefficient: per-token penalty on log pi - log pi_ref (in nats) inside the reward.
        entropy_coef: The weight of the entropy bonus.
        vf_coef: The weight of the value loss.
        clip: The clipping range (epsilon) of the policy ratio.
        value_clip: The clipping range of the value around its value at the rollout.
        gamma: The discount factor of GAE.
        lam: The lambda of GAE.
        ppo_epochs: The number of optimisation epochs per rollout.
        mini_batch_size: The number of responses per optimizer step and process.
        micro_batch_size: The number of responses per forward and backward pass. A smaller one needs less memory; the
            result is the same.
        temperature: The sampling temperature of the rollouts.
        response_length: The maximum number of new tokens of a response.
        length_bonus: The reward of an answer of ``response_length`` tokens; proportional to the length for shorter
            ones. Reasoning doesn't count.
        no_eos_penalty: Added to the reward of a response that was cut off at ``response_length``.
        reward_scale: The factor of all rewards.
        max_grad_norm: The maximum norm of the gradients; larger ones are scaled down to it.
        lr: The peak learning rate. It rises linearly over the warm-up and decays to 0 along a cosine.
        warmup_steps: The number of rollouts of the warm-up.
        weight_decay: The weight decay of AdamW.
        seed: The seed of the adapters' initial weights, of the sampled responses and of the order of the mini-batches.
        budget: The largest share of safe images that the policy may call Unsafe (objectives/budget.py). A response to a
            safe image that the judge classifies as Unsafe loses reward while the share is above the budget. None for no
            budget.
        budget_step: The change, in each rollout, of the integral in the budget's Lagrange multiplier, per unit by which
            the share of the latest 256 safe images exceeds the budget.
    """

    def __init__(
        self,
        vlm: LocalVLM,
        judge: Judge,
        value_on: Literal["adapter", "policy"] = "adapter",
        kl_coef: float = 0.1,
        entropy_coef: float = 0.02,
        vf_coef: float = 0.1,
        clip: float = 0.2,
        value_clip: float = 0.2,
        gamma: float = 1.0,
        lam: float = 1.0,
        ppo_epochs: int = 1,
        mini_batch_size: int = 32,
        micro_batch_size: int = 8,
        temperature: float = 1.0,
        response_length: int = 512,
        length_bonus: float = 4.0,
        no_eos_penalty: float = -8.0,
        reward_scale: float = 10.0,
        max_grad_norm: float = 1.0,
        lr: float = 3e-5,
        warmup_steps: int = 5,
        weight_decay: float = 0.0,
        seed: int = 0,
        budget: float | None = None,
        budget_step: float = 0.5,
    ) -> None:
        in_range("model", least=1, ppo_epochs=ppo_epochs)
        in_range("model", above=0, clip=clip, value_clip=value_clip)
        in_range("model", least=0, kl_coef=kl_coef, entropy_coef=entropy_coef, vf_coef=vf_coef)
        in_range("model", least=0, most=1, gamma=gamma, lam=lam)
        in_range("model", reward_scale=reward_scale)
        super().__init__(
            vlm,
            judge,
            group_size=1,
            epochs=ppo_epochs,
            mini_batch_size=mini_batch_size,
            micro_batch_size=micro_batch_size,
            temperature=temperature,
            response_length=response_length,
            length_bonus=length_bonus,
            no_eos_penalty=no_eos_penalty,
            max_grad_norm=max_grad_norm,
            lr=lr,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            seed=seed,
            budget=budget,
            budget_step=budget_step,
        )
        self.adapters = ("policy", "value") if value_on == "adapter" else ("policy",)
        self.value_on, self.ppo_epochs = value_on, ppo_epochs
        self.kl_coef, self.entropy_coef, self.vf_coef = kl_coef, entropy_coef, vf_coef
        self.clip, self.value_clip, self.gamma, self.lam = clip, value_clip, gamma, lam
        self.reward_scale = reward_scale
        self.value_head: nn.Linear | None = None

    def configure_model(self) -> None:
        """Loads base weights and judge, adds the adapters and the value head, which is initialised to zero."""
        super().configure_model()
        if self.value_head is None:
            self.value_head = nn.Linear(self.vlm.hidden_size, 1)
            self.value_head.load_state_dict({n: torch.zeros_like(p) for n, p in self.value_head.state_dict().items()})

    def columns(self, batch: Batch) -> dict[str, Tensor]:
        """Scores the responses of a micro-batch under policy and reference, and by the value function.

        Args:
            batch: M questions with one response each.

        Returns:
            (M, T) tensors by name.
        """
        scores, values = self.score(batch)
        reference = self.vlm.score(batch, adapter="reference", sampling=self.sampling).logprobs
        return {"mask": scores.mask, "logprobs": scores.logprobs, "reference": reference, "values": values}

    @torch.no_grad()
    def rollout(self, batch: Batch, seed: int) -> ValuedRollout:
        """Samples responses and computes rewards, advantages and returns.

        Args:
            batch: B questions without completions.
            seed: The seed of the sampling.

        Returns:
            The inputs of :meth:`update`, with the metrics of this process.

        Raises:
            NotFiniteError: A score, a value or an output of the judge is NaN or infinite.
        """
        sampled = self.sample(batch, seed)
        mask, logprobs, reference, values = (
            sampled.columns[name] for name in ("mask", "logprobs", "reference", "values")
        )
        require_finite("model: outputs of the value function", values)
        charged = constrained(sampled.rewards, sampled.costs, sampled.multiplier)
        rewards = token_rewards(charged, logprobs, reference, mask, self.kl_coef, self.reward_scale)
        advantages = gae(rewards, values, mask, self.gamma, self.lam)
        returns = advantages + values
        return ValuedRollout(
            batch=sampled.batch,
            answers=sampled.answers,
            mask=mask,
            logprobs=logprobs,
            advantages=whiten(advantages, mask, self.sum_over_ranks),
            metrics=sampled.metrics | {"explained_variance": explained_variance(returns[mask], values[mask])},
            values=values,
            returns=returns,
        )

    def losses(self, rollout: ValuedRollout, rows: Tensor) -> dict[str, Tensor]:
        """Computes the terms of the loss, summed over the response tokens of some responses.

        Args:
            rollout: See :meth:`rollout`.
            rows: (M,) indices of the responses.

        Returns:
            Scalars by name: ``policy_loss``, ``value_loss``, ``entropy``, ``clip_fraction``, ``value_clip_fraction``
            and ``approx_kl``.
        """
        scores, values = self.score(rollout.select(rows), entropy=True)
        mask, length, rows = scores.mask, scores.mask.shape[1], rows.to(self.device)
        old = [part[rows, :length] for part in (rollout.logprobs, rollout.advantages, rollout.values, rollout.returns)]
        old_logprobs, advantages, old_values, returns = old
        ratio = importance_ratio(scores.logprobs, old_logprobs, mask, "token")
        policy, clipped = ppo_policy_loss(ratio, advantages, self.clip)
        value, value_clipped = ppo_value_loss(values, old_values, returns, self.value_clip)
        entropy = scores.entropy if scores.entropy is not None else torch.zeros_like(policy)
        parts = {
            "policy_loss": policy,
            "value_loss": value,
            "entropy": entropy,
            "clip_fraction": clipped,
            "value_clip_fraction": value_clipped,
            "approx_kl": approx_kl(scores.logprobs.detach(), old_logprobs),
        }
        return {name: (part * mask).sum() for name, part in parts.items()}

    def total(self, sums: dict[str, Tensor]) -> Tensor:
        """Returns the sum to minimise.

        Args:
            sums: See :meth:`losses`.
        """
        return sums["policy_loss"] + self.vf_coef * sums["value_loss"] - self.entropy_coef * sums["entropy"]

    def score(self, batch: Batch, entropy: bool = False) -> tuple[Scores, Tensor]:
        """Scores the completions of a batch under the policy and by the value function.

        Args:
            batch: B questions with one completion each.
            entropy: Whether to compute the entropy of the next-token distributions.

        Returns:
            The scores of the policy, and the (B, T) value of the state before each response token, 0 elsewhere.
        """
        assert self.value_head is not None  # noqa: S101 (configure_model made it; for the type checker)
        on_policy = self.value_on == "policy"
        scores = self.vlm.score(batch, sampling=self.sampling, entropy=entropy, hidden=on_policy)
        states = scores.hidden.detach() if scores.hidden is not None else self.vlm.hidden(batch, adapter="value")
        return scores, self.value_head(states.to(self.value_head.weight.dtype))[..., 0] * scores.mask
