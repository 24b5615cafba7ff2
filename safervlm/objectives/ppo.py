"""Proximal policy optimisation (arXiv:1707.06347) against a response judge, as in arXiv:2507.11155.

A batch is a rollout:

1. The policy generates responses to the questions.
2. The responses are scored under the policy, under the reference (adapter disabled), and by the value function.
3. The judge classifies the responses; ``sequence_rewards`` and ``token_rewards`` (functional.py) compute the paper's
   reward. A response without an answer (unfinished thinking) is in none of the metrics ``judged`` and ``accuracy``.
4. GAE computes the advantages. Returns are advantages + values; the advantages are then whitened over the batch.
5. ``ppo_epochs`` passes over mini-batches, with one optimizer step each, minimise ``L_policy + c_v L_value - c_e H``,
   averaged over the response tokens of a mini-batch (of all processes together, as are the statistics above).

Differences from the published implementation: responses are not padded to ``response_length``; equal judge scores are
normalised to 0.5, not 0/0; scoring excludes the tokens that sampling suppresses; the adapters have no dropout; the base
model has the precision ``vlm.dtype`` rather than 4 bits.
"""

import inspect
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from safervlm.finite import must_be_finite_now
from safervlm.hashing import seed_for
from safervlm.judging.classifier import Judge
from safervlm.objectives.base import Objective
from safervlm.objectives.functional import (
    approx_kl,
    explained_variance,
    gae,
    in_parts,
    ppo_policy_loss,
    ppo_value_loss,
    sequence_rewards,
    token_rewards,
    whiten,
)
from safervlm.protocol import LABELS
from safervlm.ranges import in_range
from safervlm.vlm.base import Batch, Generation, Scores, must_be_answered
from safervlm.vlm.local import LocalVLM
from safervlm.vlm.sampling import Sampling


@dataclass
class Rollout:
    """A batch with its responses and the inputs of the updates; B responses, T tokens of the longest one.

    Attributes:
        batch: the questions, with encoded images.
        answers: the B generated responses.
        mask: (B, T) True at response tokens.
        logprobs: (B, T) log-probabilities under the policy that generated the responses.
        values: (B, T) value of the state before each token.
        advantages: (B, T) whitened advantages.
        returns: (B, T) advantages before whitening, plus values.
        metrics: scalar means over this process's rollout, by name.
    """

    batch: Batch
    answers: list[Generation]
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    metrics: dict[str, Tensor]


class PPO(Objective):
    """Proximal policy optimisation, rewarded by an alignment judge.

    Args:
        vlm: the model to align.
        judge: the alignment judge. Its log-probability of the image's label is the reward of a response; it is frozen.
        value_on: where the value head (a linear layer) is placed. ``adapter``: on a separate LoRA adapter, as published
            (two forward passes per step). ``policy``: on the policy's hidden states, detached (one forward pass).
        kl_coef: the KL coefficient: per-token penalty on log pi - log pi_ref (in nats) inside the reward.
        entropy_coef: the weight of the entropy bonus.
        vf_coef: the weight of the value loss.
        clip: the clipping range (epsilon) of the policy ratio.
        value_clip: the clipping range of the value around its value at the rollout.
        gamma: the discount factor of GAE.
        lam: the lambda of GAE.
        ppo_epochs: the number of optimisation epochs per rollout.
        mini_batch_size: the number of responses per optimizer step and process.
        micro_batch_size: the number of responses per forward and backward pass. A smaller one needs less memory; the
            result is the same.
        temperature: the sampling temperature of the rollouts.
        response_length: the maximum number of new tokens of a response.
        length_bonus: the reward of a response of ``response_length`` tokens; proportional to the length for shorter
            ones.
        no_eos_penalty: added to the reward of a response that was cut off at ``response_length``.
        reward_scale: the factor of all rewards.
        max_grad_norm: the maximum norm of the gradients; larger ones are scaled down to it.
        lr: the peak learning rate. It rises linearly over the warm-up and decays to 0 along a cosine.
        warmup_steps: the number of rollouts of the warm-up.
        weight_decay: the weight decay of AdamW.
        seed: the seed of the adapters' initial weights, of the sampled responses and of the order of the mini-batches.
    """

    judge: Judge
    completions = 0  # the policy generates them

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
    ) -> None:
        super().__init__(vlm, lr, warmup_steps, weight_decay, seed)
        in_range("model", least=1, ppo_epochs=ppo_epochs, mini_batch_size=mini_batch_size)
        in_range("model", least=1, micro_batch_size=micro_batch_size, response_length=response_length)
        positive = {"temperature": temperature, "clip": clip, "value_clip": value_clip, "max_grad_norm": max_grad_norm}
        in_range("model", above=0, **positive)
        in_range("model", least=0, kl_coef=kl_coef, entropy_coef=entropy_coef, vf_coef=vf_coef)
        in_range("model", least=0, most=1, gamma=gamma, lam=lam)
        in_range("model", length_bonus=length_bonus, no_eos_penalty=no_eos_penalty, reward_scale=reward_scale)
        judge.require_labels(LABELS["alignment"], "model.judge")
        vlm.lora = replace(vlm.lora, dropout=0.0)
        self.automatic_optimization = False
        self.adapters = ("policy", "value") if value_on == "adapter" else ("policy",)
        self.value_on = value_on
        # Not registered as a submodule: DeepSpeed in bfloat16 rounds their weights, which would change the judge.
        object.__setattr__(self, "judge", judge)
        self.kl_coef, self.entropy_coef, self.vf_coef = kl_coef, entropy_coef, vf_coef
        self.clip, self.value_clip, self.gamma, self.lam = clip, value_clip, gamma, lam
        self.ppo_epochs, self.mini_batch_size, self.micro_batch_size = ppo_epochs, mini_batch_size, micro_batch_size
        self.sampling = Sampling(temperature, top_p=1.0, max_new_tokens=response_length)
        self.length_bonus, self.no_eos_penalty = length_bonus, no_eos_penalty
        self.reward_scale, self.max_grad_norm = reward_scale, max_grad_norm
        self.value_head: nn.Linear | None = None

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine the trained weights (see :meth:`Objective.describe`)."""
        names = inspect.signature(type(self)).parameters.keys() - {"vlm", "judge"}
        settings = super().describe() | {name: getattr(self, name) for name in sorted(names) if hasattr(self, name)}
        return settings | {"sampling": vars(self.sampling), "noise": self.vlm.noise, "judge": self.judge.fingerprint}

    def setup(self, stage: str) -> None:
        """Configures gradient clipping of DeepSpeed, which clips by itself under manual optimisation."""
        super().setup(stage)
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.trainer.strategy.config["gradient_clipping"] = self.max_grad_norm  # type: ignore[index]

    def schedule_steps(self) -> int:
        """Returns the number of rollouts: the schedule steps once per rollout, ``max_steps`` counts optimizer steps."""
        rollouts = super().schedule_steps()
        if self.trainer.max_steps < 0:
            return rollouts
        batch_size = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        return min(rollouts, ceil(self.trainer.max_steps / (self.ppo_epochs * ceil(batch_size / self.mini_batch_size))))

    def configure_model(self) -> None:
        """Loads base weights and judge, adds the adapters and the value head, which is initialised to zero."""
        super().configure_model()
        self.judge.configure_model()
        if self.value_head is None:
            self.value_head = nn.Linear(self.vlm.hidden_size, 1)
            self.value_head.load_state_dict({n: torch.zeros_like(p) for n, p in self.value_head.state_dict().items()})

    def on_fit_start(self) -> None:
        """Moves the judge to the device of the model; it is no submodule, so Lightning does not."""
        self.judge.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Runs one rollout and its updates; returns questions and responses for the callbacks (RolloutLog)."""
        rollout = self.rollout(batch, seed_for(self.seed, "rollout", self.current_epoch, batch_idx))
        metrics = rollout.metrics | self.update(rollout, seed_for(self.seed, "order", self.current_epoch, batch_idx))
        for name, value in metrics.items():
            bar = name in ("reward", "accuracy", "kl")
            self.log(f"train/{name}", value, prog_bar=bar, sync_dist=True, batch_size=len(batch))
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return {"questions": batch.questions, "answers": rollout.answers}

    @torch.no_grad()
    def rollout(self, batch: Batch, seed: int) -> Rollout:
        """Generates and scores responses; computes rewards, advantages and returns (steps 1 to 4 of the module).

        Args:
            batch: B questions without completions.
            seed: the seed of the sampling.

        Returns:
            The inputs of :meth:`update`, with the metrics of this process.

        Raises:
            NotFiniteError: a score, a value or an output of the judge is NaN or infinite.
        """
        answers = must_be_answered(self.vlm.generate(batch, self.sampling, seed))
        length = max(len(answer.token_ids) for answer in answers)
        columns: list[list[Tensor]] = [[], [], [], []]
        for rows in torch.arange(len(batch)).split(self.micro_batch_size):
            part = batch.select(rows, [answer.token_ids for answer in answers])
            scores, values = self.score(part)
            reference = self.vlm.score(part, adapter="reference", sampling=self.sampling).logprobs
            for column, tensor in zip(columns, (scores.mask, scores.logprobs, reference, values), strict=True):
                column.append(F.pad(tensor, (0, length - tensor.shape[1])))
        mask, logprobs, reference, values = (torch.cat(column) for column in columns)

        verdicts = self.judge.judge([answer.text for answer in answers]).to(self.device)
        labels = torch.tensor([self.judge.labels.index(q.answer) for q in batch.questions], device=self.device)
        judged = verdicts.gather(1, labels[:, None])[:, 0]
        must_be_finite_now("model: outputs of model.judge or of the value function", judged, values)
        answered = torch.tensor([answer.answered for answer in answers], device=self.device)
        # The last batch of an epoch may hold one response more in one process than in another.
        low = self.all_gather(judged.where(answered, torch.inf).min()).min()  # type: ignore[union-attr]
        high = self.all_gather(judged.where(answered, -torch.inf).max()).max()  # type: ignore[union-attr]
        lengths, stopped = mask.sum(-1), torch.tensor([a.finish_reason == "stop" for a in answers], device=self.device)
        longest, bonus = self.sampling.max_new_tokens, self.length_bonus
        scored = judged.where(answered, low)  # a response without an answer has the lowest score of those with one
        earned = sequence_rewards(scored, low, high, stopped, lengths, longest, self.no_eos_penalty, bonus)
        rewards = token_rewards(earned, logprobs, reference, mask, self.kl_coef, self.reward_scale)
        advantages = gae(rewards, values, mask, self.gamma, self.lam)
        returns = advantages + values
        metrics = {
            "reward": earned.mean(),
            "judged": judged[answered].sum() / answered.sum().clamp(min=1),
            "accuracy": ((verdicts.argmax(-1) == labels) & answered).sum() / answered.sum().clamp(min=1),
            "kl": ((logprobs - reference) * mask).sum(-1).mean(),
            "length": lengths.float().mean(),
            "stopped": stopped.float().mean(),
            "explained_variance": explained_variance(returns[mask], values[mask]),
        }
        metrics |= {"thinking_unfinished": 1 - answered.float().mean()} if self.vlm.thinking.marks else {}
        return Rollout(
            batch, answers, mask, logprobs, values, whiten(advantages, mask, self.sum_over_ranks), returns, metrics
        )

    def update(self, rollout: Rollout, seed: int) -> dict[str, Tensor]:
        """Runs the clipped PPO updates of a rollout (step 5 of the module).

        Args:
            rollout: see :meth:`rollout`.
            seed: the seed of the order of the responses.

        Returns:
            The terms of :meth:`losses`, averaged over the response tokens of all epochs of this process.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # noqa: S101 (one optimizer; for the type checker)
        generator = torch.Generator().manual_seed(seed)
        totals: dict[str, Tensor] = {}
        # All processes take part in each step and each backward pass, so they have to agree on the number of these.
        # The process with the fewest responses determines it; one with a response more adds it to its last part.
        fewest = int(self.all_gather(torch.tensor(len(rollout.answers), device=self.device)).min())  # type: ignore[union-attr]
        for _ in range(self.ppo_epochs):
            order = torch.randperm(len(rollout.answers), generator=generator)
            for start, mini in zip(
                range(0, fewest, self.mini_batch_size), in_parts(order, self.mini_batch_size, fewest), strict=True
            ):
                tokens = self.sum_over_ranks(rollout.mask[mini.to(self.device)].sum())
                micros = in_parts(mini, self.micro_batch_size, min(self.mini_batch_size, fewest - start))
                for micro in micros:
                    sums = self.losses(rollout, micro)
                    loss = sums["policy_loss"] + self.vf_coef * sums["value_loss"] - self.entropy_coef * sums["entropy"]
                    self.backward_part(loss * self.trainer.world_size / tokens, last=micro is micros[-1])
                    for name, value in sums.items():
                        totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()
                if not isinstance(self.trainer.strategy, DeepSpeedStrategy):
                    self.clip_gradients(optimizer, self.max_grad_norm, "norm")  # type: ignore[arg-type]
                optimizer.step()
                optimizer.zero_grad()
        return {name: total / (self.ppo_epochs * rollout.mask.sum()) for name, total in totals.items()}

    def losses(self, rollout: Rollout, rows: Tensor) -> dict[str, Tensor]:
        """Computes the terms of the loss, summed over the response tokens of some responses.

        Args:
            rollout: see :meth:`rollout`.
            rows: (M,) indices of the responses.

        Returns:
            Scalars by name: ``policy_loss``, ``value_loss``, ``entropy``, ``clip_fraction``, ``value_clip_fraction``
            and ``approx_kl``.
        """
        scores, values = self.score(
            rollout.batch.select(rows, [answer.token_ids for answer in rollout.answers]), entropy=True
        )
        mask, length, rows = scores.mask, scores.mask.shape[1], rows.to(self.device)
        old = [part[rows, :length] for part in (rollout.logprobs, rollout.advantages, rollout.values, rollout.returns)]
        old_logprobs, advantages, old_values, returns = old
        policy, clipped = ppo_policy_loss((scores.logprobs - old_logprobs).exp(), advantages, self.clip)
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

    def score(self, batch: Batch, entropy: bool = False) -> tuple[Scores, Tensor]:
        """Scores the completions of a batch under the policy and by the value function.

        Args:
            batch: B questions with one completion each.
            entropy: whether to compute the entropy of the next-token distributions.

        Returns:
            The scores of the policy, and the (B, T) value of the state before each response token, 0 elsewhere.
        """
        assert self.value_head is not None  # noqa: S101 (configure_model made it; for the type checker)
        on_policy = self.value_on == "policy"
        scores = self.vlm.score(batch, sampling=self.sampling, entropy=entropy, hidden=on_policy)
        states = scores.hidden.detach() if scores.hidden is not None else self.vlm.hidden(batch, adapter="value")
        return scores, self.value_head(states.to(self.value_head.weight.dtype))[..., 0] * scores.mask

    def backward_part(self, loss: Tensor, last: bool) -> None:
        """Back-propagates the loss of a micro-batch.

        Without ``set_gradient_accumulation_boundary``, ZeRO-2 keeps only the gradients of the last micro-batch.

        Args:
            loss: scalar.
            last: whether the micro-batch is the last one of its optimizer step.
        """
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.trainer.strategy.deepspeed_engine.set_gradient_accumulation_boundary(last)
        self.manual_backward(loss)
