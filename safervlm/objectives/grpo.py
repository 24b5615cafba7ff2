r"""Group-relative policy optimisation (arXiv:2402.03300): a response's baseline comes from its group, not a critic.

The policy generates G responses to each question, and the judge rewards them (:class:`OnPolicy`). The updates minimise

.. math:: L = \frac{1}{N}\sum_i\sum_t w_{i,t}\left[-\min\left(\rho_{i,t} A_i,\
    \mathrm{clip}(\rho_{i,t}, 1-\epsilon, 1+\epsilon_{high}) A_i\right) + \beta\,(e^{d_{i,t}} - 1 - d_{i,t})\right],
    \qquad d_{i,t} = \log\frac{\pi_{ref}(y_{i,t})}{\pi(y_{i,t})}

with the advantages A (:func:`group_advantages`), the ratios :math:`\rho` (:func:`importance_ratio`), the weights w
(:func:`token_weights`) and their number N (:func:`summands`) of functional.py. The published methods as settings:

- GRPO (equation 3 of arXiv:2402.03300): the default values.
- Dr. GRPO (arXiv:2503.20783): ``advantage: centred``, ``average: length``, ``kl_coef: 0``.
- RLOO (arXiv:2402.14740): ``advantage: leave_one_out``, ``ratio: product``, ``kl: reward``.
- GSPO (arXiv:2507.18071): ``ratio: answer``, ``clip: 3.0e-4``, ``clip_high: 4.0e-4``, ``kl_coef: 0``.
- DAPO (arXiv:2503.14476): ``average: token``, ``clip_high: 0.28``, ``kl_coef: 0``.

Differences from the papers: the reward is the judge's, as in PPO. A group whose rewards are equal (a spread of at most
1e-4) has no advantages and is skipped in the updates, including its KL term; its responses count in N, so that
without a KL term the loss is the same. DAPO samples other questions in its place. Dropout is off.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safervlm.judging.classifier import Judge
from safervlm.objectives.functional import (
    approx_kl,
    constrained,
    group_advantages,
    importance_ratio,
    ppo_policy_loss,
    summands,
    token_weights,
)
from safervlm.objectives.on_policy import OnPolicy
from safervlm.objectives.rollout import Rollout
from safervlm.ranges import in_range
from safervlm.vlm.base import Batch
from safervlm.vlm.local import LocalVLM

EQUAL = 1e-4  # spread of the rewards of a group up to which they are equal; the judge's rounding is smaller


@dataclass
class GroupRollout(Rollout):
    """A rollout of groups.

    Attributes:
        reference: (B, T) log-probabilities under the reference.
        rewards: (B,) rewards of the responses, including a KL penalty in the reward.
        signal: (B,) False for the responses of a group whose rewards are equal.
    """

    reference: Tensor
    rewards: Tensor
    signal: Tensor


class GRPO(OnPolicy):
    """Group-relative policy optimisation, rewarded by an alignment judge.

    Args:
        vlm: The model to align.
        judge: The alignment judge. Its log-probability of the image's label is the reward of a response; it is frozen.
        group_size: The number of responses to each question.
        advantage: How the rewards of a group become advantages. ``group``: minus the mean, divided by the standard
            deviation. ``centred``: minus the mean. ``leave_one_out``: minus the mean of the others.
        ratio: The importance ratio: of each ``token``; of the ``answer`` per token (geometric mean over its tokens); or
            the ``product`` over its tokens.
        average: How the loss is averaged: over the tokens of each ``answer``, then over the responses; over every
            ``token``; or ``length``: the sum over each response divided by ``response_length``.
        clip: The clipping range (epsilon) of the ratio.
        clip_high: The clipping range above 1; None uses ``clip``.
        kl: Where the KL divergence from the reference is penalised: in the ``loss`` (each token, k3) or in the
            ``reward`` (log pi - log pi_ref of the response).
        kl_coef: The KL coefficient.
        epochs: The number of optimisation epochs per rollout.
        mini_batch_size: The number of responses per optimizer step and process; a multiple of ``group_size`` keeps
            groups together.
        micro_batch_size: The number of responses per forward and backward pass. A smaller one needs less memory; the
            result is the same. Responses to one question share image and prompt within a pass.
        temperature: The sampling temperature of the rollouts.
        response_length: The maximum number of new tokens of a response.
        length_bonus: The reward of an answer of ``response_length`` tokens; proportional to the length for shorter
            ones. Reasoning doesn't count.
        no_eos_penalty: Added to the reward of a response that was cut off at ``response_length``.
        max_grad_norm: The maximum norm of the gradients; larger ones are scaled down to it.
        lr: The peak learning rate. It rises linearly over the warm-up and decays to 0 along a cosine.
        warmup_steps: The number of rollouts of the warm-up.
        weight_decay: The weight decay of AdamW.
        seed: The seed of the adapter's initial weights, of the sampled responses and of the order of the mini-batches.
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
        group_size: int = 8,
        advantage: Literal["group", "centred", "leave_one_out"] = "group",
        ratio: Literal["token", "answer", "product"] = "token",
        average: Literal["answer", "token", "length"] = "answer",
        clip: float = 0.2,
        clip_high: float | None = None,
        kl: Literal["loss", "reward"] = "loss",
        kl_coef: float = 0.04,
        epochs: int = 1,
        mini_batch_size: int = 64,
        micro_batch_size: int = 8,
        temperature: float = 1.0,
        response_length: int = 512,
        length_bonus: float = 0.0,
        no_eos_penalty: float = -1.0,
        max_grad_norm: float = 1.0,
        lr: float = 3e-5,
        warmup_steps: int = 5,
        weight_decay: float = 0.0,
        seed: int = 0,
        budget: float | None = None,
        budget_step: float = 0.5,
    ) -> None:
        in_range("model", least=2, group_size=group_size)
        in_range("model", least=1, epochs=epochs)
        in_range("model", above=0, clip=clip, clip_high=clip_high)
        in_range("model", least=0, kl_coef=kl_coef)
        super().__init__(
            vlm,
            judge,
            group_size,
            epochs,
            mini_batch_size,
            micro_batch_size,
            temperature,
            response_length,
            length_bonus,
            no_eos_penalty,
            max_grad_norm,
            lr,
            warmup_steps,
            weight_decay,
            seed,
            budget,
            budget_step,
        )
        self.advantage, self.ratio, self.average = advantage, ratio, average
        self.clip, self.clip_high, self.kl, self.kl_coef = clip, clip_high, kl, kl_coef

    def columns(self, batch: Batch) -> dict[str, Tensor]:
        """Scores the responses of a micro-batch under policy and reference.

        Args:
            batch: M questions with one response each.

        Returns:
            (M, T) tensors by name.
        """
        scores = self.vlm.score(batch, sampling=self.sampling, entropy=True)
        reference = self.vlm.score(batch, adapter="reference", sampling=self.sampling).logprobs
        assert scores.entropy is not None  # noqa: S101 (requested; for the type checker)
        return {"mask": scores.mask, "logprobs": scores.logprobs, "reference": reference, "entropy": scores.entropy}

    @torch.no_grad()
    def rollout(self, batch: Batch, seed: int) -> GroupRollout:
        """Samples the groups and computes their advantages.

        Args:
            batch: Q questions without completions.
            seed: The seed of the sampling.

        Returns:
            The inputs of :meth:`update`, with the metrics of this process.

        Raises:
            NotFiniteError: A score or an output of the judge is NaN or infinite.
        """
        sampled = self.sample(batch, seed)
        mask, logprobs, reference, entropy = (
            sampled.columns[name] for name in ("mask", "logprobs", "reference", "entropy")
        )
        rewards = sampled.rewards
        if self.kl == "reward":
            rewards = rewards - self.kl_coef * (logprobs - reference).sum(-1)
        groups, costs = rewards.view(-1, self.group_size), sampled.costs.view(-1, self.group_size)
        signal = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True) > EQUAL
        # The rewards are not combined: dividing by the standard deviation of a group undoes a multiplier of the costs.
        gains, charges = group_advantages(groups, self.advantage), group_advantages(costs, self.advantage)
        advantages = constrained(gains, charges, sampled.multiplier) * signal
        metrics = {"no_signal": 1 - signal.float().mean(), "entropy": entropy.sum() / mask.sum()}
        return GroupRollout(
            batch=sampled.batch,
            answers=sampled.answers,
            mask=mask,
            logprobs=logprobs,
            advantages=advantages.view(-1, 1),
            metrics=sampled.metrics | metrics,
            reference=reference,
            rewards=rewards,
            signal=signal.expand_as(groups).flatten(),
        )

    def used(self, rollout: GroupRollout, rows: Tensor) -> Tensor:
        """Selects the responses that an update uses: those of groups whose rewards differ.

        Args:
            rollout: See :meth:`rollout`.
            rows: (M,) indices of the responses.
        """
        return rows[rollout.signal.to(rows.device)[rows]]

    def losses(self, rollout: GroupRollout, rows: Tensor) -> dict[str, Tensor]:
        """Computes the terms of the loss, summed over some responses with the weights of the average.

        Args:
            rollout: See :meth:`rollout`.
            rows: (M,) indices of the responses.

        Returns:
            Scalars by name: ``policy_loss``, ``clip_fraction_low`` and ``clip_fraction_high`` (ratios clipped below and
            above 1), ``approx_kl``, and ``kl_loss`` if the KL divergence is in the loss.
        """
        scores = self.vlm.score(rollout.select(rows), sampling=self.sampling)
        mask, length, rows = scores.mask, scores.mask.shape[1], rows.to(self.device)
        old, reference = rollout.logprobs[rows, :length], rollout.reference[rows, :length]
        advantages = rollout.advantages[rows]
        ratio = importance_ratio(scores.logprobs, old, mask, self.ratio)
        policy, clipped = ppo_policy_loss(ratio, advantages, self.clip, self.clip_high)
        parts = {
            "policy_loss": policy,
            "clip_fraction_low": clipped & (advantages < 0),
            "clip_fraction_high": clipped & (advantages > 0),
            "approx_kl": approx_kl(scores.logprobs.detach(), old),
        }
        if self.kl == "loss" and self.kl_coef:
            parts["kl_loss"] = approx_kl(reference, scores.logprobs)
        weights = token_weights(mask, self.average, self.sampling.max_new_tokens)
        # Divided by the maximum length, the clip fractions would not be shares of tokens.
        shares = token_weights(mask, "answer", 1) if self.average == "length" else weights
        return {name: (part * (weights if "loss" in name else shares)).sum() for name, part in parts.items()}

    def total(self, sums: dict[str, Tensor]) -> Tensor:
        """Returns the sum to minimise.

        Args:
            sums: See :meth:`losses`.
        """
        return sums["policy_loss"] + self.kl_coef * sums["kl_loss"] if "kl_loss" in sums else sums["policy_loss"]

    def summands(self, mask: Tensor) -> Tensor:
        """Returns the number by which the sums of :meth:`losses` are divided.

        Args:
            mask: (M, T) True at the tokens of some responses.
        """
        return summands(mask, self.average)
