"""Base class of the on-policy objectives: sampled responses, the judge's reward, and the loop of the updates.

A batch is a rollout:

1. The policy generates ``group_size`` responses to each question.
2. The responses are scored under the policy and under the reference (adapter disabled).
3. The judge classifies the responses; ``sequence_rewards`` (functional.py) computes the paper's reward. A response
   without an answer (unfinished thinking) is in none of the metrics ``judged`` and ``accuracy``. With a budget for
   over-flagging (budget.py), the responses that call a safe image Unsafe are counted.
4. A subclass computes advantages, by a value function (PPO) or within the groups (GRPO), and includes their costs.
5. ``epochs`` passes over mini-batches, with one optimizer step each, minimise the loss of the subclass, averaged over a
   mini-batch (of all processes together, as are the statistics above).

The responses to the questions about an image stay together in the mini-batches, and in a micro-batch where they fit, so
that a VLM which packs rows computes their image and prompt once. Micro-batches are sorted by length.
"""

import inspect
from abc import ABC, abstractmethod
from dataclasses import replace
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from safervlm.finite import require_finite
from safervlm.hashing import seed_for
from safervlm.judging.classifier import Judge
from safervlm.objectives.base import Objective
from safervlm.objectives.budget import OverFlaggingBudget
from safervlm.objectives.functional import sequence_rewards
from safervlm.objectives.parts import micro_batches, rows_by_name, split_into_parts
from safervlm.objectives.rollout import Rollout, Sampled, answer_length, logprob_differences
from safervlm.protocol import LABELS, SAFE, UNSAFE
from safervlm.ranges import in_range
from safervlm.vlm.base import Batch, require_responses
from safervlm.vlm.local import LocalVLM
from safervlm.vlm.sampling import RecordedSampling


class OnPolicy(Objective, ABC):
    """Base class of the objectives that train on sampled responses, rewarded by an alignment judge.

    A subclass implements :meth:`columns`, :meth:`rollout`, :meth:`losses`, :meth:`total` and :meth:`summands`.

    Args:
        vlm: The model to align.
        judge: The alignment judge. Its log-probability of the image's label is the reward of a response; it is frozen.
        group_size: The number of responses to each question.
        epochs: The number of optimisation epochs per rollout.
        mini_batch_size: The number of responses per optimizer step and process.
        micro_batch_size: The number of responses per forward and backward pass.
        temperature: The sampling temperature of the rollouts.
        response_length: The maximum number of new tokens of a response.
        length_bonus: The reward of an answer of ``response_length`` tokens; proportional to the length for shorter
            ones. Reasoning doesn't count.
        no_eos_penalty: Added to the reward of a response that was cut off at ``response_length``.
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

    judge: Judge
    completions = 0  # the policy generates them

    def __init__(
        self,
        vlm: LocalVLM,
        judge: Judge,
        group_size: int,
        epochs: int,
        mini_batch_size: int,
        micro_batch_size: int,
        temperature: float,
        response_length: int,
        length_bonus: float,
        no_eos_penalty: float,
        max_grad_norm: float,
        lr: float,
        warmup_steps: int,
        weight_decay: float,
        seed: int,
        budget: float | None,
        budget_step: float,
    ) -> None:
        super().__init__(vlm, lr, warmup_steps, weight_decay, seed)
        in_range("model", least=1, mini_batch_size=mini_batch_size)
        in_range("model", least=1, micro_batch_size=micro_batch_size, response_length=response_length)
        in_range("model", above=0, temperature=temperature, max_grad_norm=max_grad_norm, budget_step=budget_step)
        in_range("model", length_bonus=length_bonus, no_eos_penalty=no_eos_penalty)
        judge.require_labels(LABELS["alignment"], "model.judge")
        vlm.lora = replace(vlm.lora, dropout=0.0)
        self.automatic_optimization = False
        # Not registered as a submodule: DeepSpeed in bfloat16 rounds their weights, which would change the judge.
        object.__setattr__(self, "judge", judge)
        self.group_size, self.epochs = group_size, epochs
        self.mini_batch_size, self.micro_batch_size = mini_batch_size, micro_batch_size
        self.sampling = RecordedSampling(temperature, top_p=1.0, max_new_tokens=response_length)
        self.length_bonus, self.no_eos_penalty = length_bonus, no_eos_penalty
        self.max_grad_norm = max_grad_norm
        self.budget = None if budget is None else OverFlaggingBudget(budget, budget_step)

    @abstractmethod
    def columns(self, batch: Batch) -> dict[str, Tensor]:
        """Scores the responses of a micro-batch, without gradients.

        Args:
            batch: M questions with one response each.

        Returns:
            (M, T) tensors by name, among them ``mask``, ``logprobs`` (policy) and ``reference``.
        """

    @abstractmethod
    def rollout(self, batch: Batch, seed: int) -> Rollout:
        """Returns sampled responses (:meth:`sample`) with their advantages (steps 1 to 4 of the module).

        Args:
            batch: Questions without completions.
            seed: The seed of the sampling.
        """

    @abstractmethod
    def losses(self, rollout: Any, rows: Tensor) -> dict[str, Tensor]:
        """Returns the terms of the loss and the metrics of the updates by name, summed over some responses.

        Args:
            rollout: See :meth:`rollout`.
            rows: (M,) indices of the responses.
        """

    @abstractmethod
    def total(self, sums: dict[str, Tensor]) -> Tensor:
        """Returns the sum to minimise.

        Args:
            sums: See :meth:`losses`.
        """

    def summands(self, mask: Tensor) -> Tensor:
        """Returns the number by which the sums of :meth:`losses` are divided: the response tokens.

        Args:
            mask: (M, T) True at the tokens of some responses.
        """
        return mask.sum()

    def used(self, rollout: Any, rows: Tensor) -> Tensor:
        """Selects the responses that an update uses: all of them.

        Args:
            rollout: See :meth:`rollout`.
            rows: (M,) indices of the responses.
        """
        return rows

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine the trained weights (see :meth:`Objective.describe`)."""
        names = inspect.signature(type(self)).parameters.keys() - {"vlm", "judge", "budget", "budget_step"}
        settings = {name: getattr(self, name) for name in sorted(names) if hasattr(self, name)}
        rollout = {"sampling": vars(self.sampling), "noise": self.vlm.noise, "judge": self.judge.fingerprint}
        if self.budget is not None:
            rollout |= {"budget": self.budget.budget, "budget_step": self.budget.step}
        return super().describe() | settings | rollout

    def setup(self, stage: str) -> None:
        """Configures gradient clipping of DeepSpeed, which clips gradients itself under manual optimisation.

        Raises:
            ArgumentError: There is a budget, and the training data has no safe images.
            RecordError: See :meth:`Objective.setup`.
        """
        super().setup(stage)
        if self.budget is not None:
            self.budget.require_safe_images(self.trainer.datamodule)  # type: ignore[attr-defined]
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.trainer.strategy.config["gradient_clipping"] = self.max_grad_norm  # type: ignore[index]

    def schedule_steps(self) -> int:
        """Returns the number of rollouts: the schedule steps once per rollout, ``max_steps`` counts optimizer steps."""
        rollouts = super().schedule_steps()
        if self.trainer.max_steps < 0:
            return rollouts
        responses = self.trainer.datamodule.batch_size * self.group_size  # type: ignore[attr-defined]
        return min(rollouts, ceil(self.trainer.max_steps / (self.epochs * ceil(responses / self.mini_batch_size))))

    def configure_model(self) -> None:
        """Loads base weights and judge, and adds the adapters."""
        super().configure_model()
        self.judge.configure_model()

    def on_fit_start(self) -> None:
        """Moves the judge to the device of the model; it is not a submodule, so Lightning does not."""
        self.judge.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Runs one rollout and its updates; returns questions and responses for the callbacks (RolloutLog)."""
        rollout = self.rollout(batch, seed_for(self.seed, "rollout", self.current_epoch, batch_idx))
        metrics = rollout.metrics | self.update(rollout, seed_for(self.seed, "order", self.current_epoch, batch_idx))
        for name, value in metrics.items():
            bar = name in ("reward", "accuracy", "kl")
            self.log(f"train/{name}", value, prog_bar=bar, sync_dist=True, batch_size=len(batch))
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return {"questions": rollout.batch.questions, "answers": rollout.answers}

    @torch.no_grad()
    def sample(self, batch: Batch, seed: int) -> Sampled:
        """Generates, scores and judges responses (steps 1 to 3 of the module).

        Args:
            batch: Questions without completions.
            seed: The seed of the sampling.

        Returns:
            The responses; those to one question are contiguous.

        Raises:
            NotFiniteError: A score or an output of the judge is NaN or infinite.
        """
        batch = batch.repeat(self.group_size)
        answers = require_responses(self.vlm.generate(batch, self.sampling, seed))
        tokens = [answer.token_ids for answer in answers]
        length = max(map(len, tokens))
        parts: list[dict[str, Tensor]] = []
        lengths = torch.tensor(list(map(len, tokens)), device=self.device)
        micro = micro_batches(torch.arange(len(batch)), batch.image_names, lengths, self.micro_batch_size)
        for rows in micro:
            found = self.columns(batch.select(rows, tokens))
            parts.append({name: F.pad(part, (0, length - part.shape[1])) for name, part in found.items()})
        order = torch.cat(micro).argsort()
        columns = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
        mask = columns["mask"]

        verdicts = self.judge.judge([answer.text for answer in answers]).to(self.device)
        labels = torch.tensor([self.judge.labels.index(q.answer) for q in batch.questions], device=self.device)
        judged = verdicts.gather(1, labels[:, None])[:, 0]
        require_finite("model: outputs of model.judge", judged)
        answered = torch.tensor([answer.answered for answer in answers], device=self.device)
        # The last batch of an epoch may have one response more in one process than in another.
        low = self.all_gather(judged.where(answered, torch.inf).min()).min()  # type: ignore[union-attr]
        high = self.all_gather(judged.where(answered, -torch.inf).max()).max()  # type: ignore[union-attr]
        stopped = torch.tensor([answer.finish_reason == "stop" for answer in answers], device=self.device)
        scored = judged.where(answered, low)  # a response without an answer has the lowest score of those with one
        of_answers = torch.tensor([answer_length(each, self.vlm.tokenizer) for each in answers], device=self.device)
        settings = self.sampling.max_new_tokens, self.no_eos_penalty, self.length_bonus
        rewards = sequence_rewards(scored, low, high, stopped, of_answers, *settings)
        predicted = verdicts.argmax(-1)
        metrics = {
            "reward": rewards.mean(),
            "judged": judged[answered].sum() / answered.sum().clamp(min=1),
            "accuracy": ((predicted == labels) & answered).sum() / answered.sum().clamp(min=1),
            "kl": ((columns["logprobs"] - columns["reference"]) * mask).sum(-1).mean(),
            "length": lengths.float().mean(),
            "stopped": stopped.float().mean(),
        }
        metrics |= {"thinking_unfinished": 1 - answered.float().mean()} if self.vlm.thinking.marks else {}
        metrics |= logprob_differences(columns["logprobs"][mask], answers)
        safe = (labels == self.judge.labels.index(SAFE)) & answered
        costs = safe & (predicted == self.judge.labels.index(UNSAFE))
        if self.budget is not None:
            self.budget.update(*self.sum_over_ranks(torch.stack([costs.sum(), safe.sum()])).tolist())
            metrics |= {name: torch.tensor(value, device=self.device) for name, value in self.budget.metrics().items()}
        multiplier = 0.0 if self.budget is None else self.budget.multiplier
        return Sampled(batch, answers, columns, rewards, costs.float(), multiplier, metrics)

    def update(self, rollout: Rollout, seed: int) -> dict[str, Tensor]:
        """Runs the updates of a rollout (step 5 of the module).

        Args:
            rollout: See :meth:`rollout`.
            seed: The seed of the order of the questions.

        Returns:
            The terms of :meth:`losses`, averaged over the responses that all epochs of this process computed.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # noqa: S101 (one optimizer; for the type checker)
        generator = torch.Generator().manual_seed(seed)
        totals: dict[str, Tensor] = {}
        computed = torch.zeros((), device=self.device)
        # All processes take part in each step and each backward pass, so they have to agree on the number of these.
        # The process with the fewest responses determines the number of steps; one with a response more adds it to its
        # last step. The process with the most responses in a step determines the number of backward passes.
        every, images = torch.arange(len(rollout.answers)), rollout.batch.image_names
        groups, lengths = rows_by_name(every, images), rollout.mask.sum(-1).cpu()
        fewest = int(self.all_gather(torch.tensor(len(every), device=self.device)).min())  # type: ignore[union-attr]
        for _ in range(self.epochs):
            order = torch.cat([groups[place] for place in torch.randperm(len(groups), generator=generator)])
            for mini in split_into_parts(order, self.mini_batch_size, fewest):
                count = self.sum_over_ranks(self.summands(rollout.mask[mini.to(self.device)]))
                parts = micro_batches(self.used(rollout, mini), images, lengths, self.micro_batch_size)
                passes = torch.tensor(len(parts), device=self.device)
                number = max(1, int(self.all_gather(passes).max()))  # type: ignore[union-attr]
                for step, micro in enumerate([*parts, *[mini[:0]] * (number - len(parts))], 1):
                    # A process without responses for a backward pass uses an arbitrary one, with weight 0.
                    sums = self.losses(rollout, micro if len(micro) else mini[:1])
                    weight = self.trainer.world_size / count if len(micro) else 0.0
                    self.backward_part(self.total(sums) * weight, last=step == number)
                    if len(micro):
                        computed += self.summands(rollout.mask[micro.to(self.device)])
                        for name, value in sums.items():
                            totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()
                    elif not totals:
                        totals = {name: torch.zeros_like(value) for name, value in sums.items()}
                if not isinstance(self.trainer.strategy, DeepSpeedStrategy):
                    self.clip_gradients(optimizer, self.max_grad_norm, "norm")  # type: ignore[arg-type]
                optimizer.step()
                optimizer.zero_grad()
        return {name: total / computed.clamp(min=1) for name, total in totals.items()}

    def backward_part(self, loss: Tensor, last: bool) -> None:
        """Back-propagates the loss of a micro-batch.

        Without ``set_gradient_accumulation_boundary``, ZeRO-2 keeps only the gradients of the last micro-batch.

        Args:
            loss: Scalar.
            last: Whether the micro-batch is the last one of its optimizer step.
        """
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.trainer.strategy.deepspeed_engine.set_gradient_accumulation_boundary(last)
        self.manual_backward(loss)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the state of the budget."""
        super().on_save_checkpoint(checkpoint)
        if self.budget is not None:
            checkpoint["budget"] = self.budget.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the state of the budget.

        Raises:
            RecordError: See :meth:`Objective.on_load_checkpoint`; or the checkpoint is from a run without a budget.
        """
        super().on_load_checkpoint(checkpoint)
        if self.budget is not None:
            self.budget.restore(checkpoint)
