"""PPO's inner step against three independent forward passes over padded responses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comparisons.model import Shape, examples, llava, lora_parameters, perturb
from comparisons.timing import LR, Row, Side, measure, titled
from safervlm.judging.classifier import Judge
from safervlm.objectives import PPO
from safervlm.objectives.ppo import ValuedRollout
from safervlm.records import Example
from safervlm.vlm.base import Generation
from safervlm.vlm.lora import active


def our_ppo(
    shape: Shape, folder: Path, value_on: Any, rollout: ValuedRollout | None = None, questions: int = 1
) -> tuple[PPO, Side, ValuedRollout]:
    """Returns an inner PPO step of SaferVLM.

    All variants start from the same adapter weights, also those of the value adapter, so that all losses agree.

    Args:
        shape: see :class:`Shape`.
        folder: the folder of the model.
        value_on: see :class:`safervlm.objectives.PPO`.
        rollout: the rollout of another variant; None to make one.
        questions: number of questions about each image.

    Returns:
        The objective, the step and the rollout.
    """
    ppo = PPO(llava(shape, folder), Judge(), value_on=value_on, response_length=shape.response_length)
    ppo.vlm.load(ppo.adapters)
    assert ppo.vlm.model is not None  # noqa: S101
    trained, value = lora_parameters(ppo.vlm.model), lora_parameters(ppo.vlm.model, "value")
    perturb(trained)
    for name, parameter in value.items():
        parameter.data.copy_(trained[name.replace(".value.", ".default.")])
    ppo.value_head = nn.Linear(shape.hidden, 1)
    nn.init.constant_(ppo.value_head.weight, 0.01)
    nn.init.zeros_(ppo.value_head.bias)
    made = rollout or make_rollout(ppo, examples(shape, folder, shape.rollouts, 1, questions))
    rows = torch.arange(shape.rollouts)

    def backward() -> Tensor:
        loss = ppo.total(ppo.losses(made, rows)) / made.mask.sum()
        loss.backward()
        return loss

    parameters = [*trained.values(), *value.values(), *ppo.value_head.parameters()]
    return ppo, Side(backward, trained, torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)), made


def make_rollout(ppo: PPO, made: Sequence[Example]) -> ValuedRollout:
    """Returns a rollout of given responses by a slightly different policy, with encoded images.

    Args:
        ppo: the objective, loaded.
        made: examples with one completion, the response.
    """
    batch = ppo.collator(made)
    packed = batch.packed
    assert packed is not None  # noqa: S101
    answers = [Generation(row[keep].tolist(), "", "stop") for row, keep in zip(packed.target, packed.mask, strict=True)]
    generator = torch.Generator().manual_seed(5)

    def noise(scale: float) -> Tensor:
        return torch.randn(packed.mask.shape, generator=generator) * scale * packed.mask

    with torch.no_grad():
        scores, values = ppo.score(batch)
    rollout = (scores.logprobs + noise(0.2), values + noise(0.2), noise(1.0), values + noise(1.0))
    logprobs, values, advantages, returns = rollout
    return ValuedRollout(batch, answers, packed.mask, logprobs, advantages, {}, values, returns)


def three_passes(shape: Shape, ppo: PPO, rollout: ValuedRollout, reference: bool = True) -> Side:
    """Returns a PPO step with the structure of the published implementation: three independent forward passes.

    Policy, value function and reference each process images, prompts and responses. Responses are padded to
    ``response_length``, the images are encoded in every pass, and the reference (without gradient) is evaluated in
    every step. As in SaferVLM, the head runs on the positions of the response only.

    Args:
        shape: see :class:`Shape`.
        ppo: the objective, loaded, with a value adapter.
        rollout: see :func:`make_rollout`.
        reference: whether to evaluate the reference; its output does not enter the loss.
    """
    batch, length = rollout.batch, shape.response_length
    base = ppo.vlm.base
    prompt = max(map(len, batch.prompt_ids))
    ids = torch.zeros(len(batch), prompt + length, dtype=torch.long)
    attention = torch.zeros_like(ids)
    mask = torch.zeros(len(batch), length, dtype=torch.bool)
    target = torch.zeros(len(batch), length, dtype=torch.long)
    for row, (question, answer) in enumerate(zip(batch.prompt_ids, rollout.answers, strict=True)):
        tokens = torch.tensor(question + answer.token_ids)
        start = prompt - len(question)
        ids[row, start : start + len(tokens)] = tokens
        attention[row, start : start + len(tokens)] = 1
        mask[row, : len(answer.token_ids)] = True
        target[row, : len(answer.token_ids)] = torch.tensor(answer.token_ids)
    wide = [
        nn.functional.pad(part, (0, length - part.shape[1]))
        for part in (rollout.logprobs, rollout.advantages, rollout.values, rollout.returns)
    ]
    old_logprobs, advantages, old_values, returns = wide
    images = batch.pixel_values[batch.image_rows]  # each row has its own image
    inputs = {"input_ids": ids, "attention_mask": attention, "pixel_values": images, "use_cache": False}
    suppressed = ppo.vlm.suppressed

    def distribution() -> Tensor:
        logits = base(**inputs, logits_to_keep=length + 1).logits[:, :-1].float()
        return logits.index_fill(-1, suppressed, torch.finfo(torch.float32).min).log_softmax(-1)

    def backward() -> Tensor:
        if reference:
            with torch.no_grad(), active(base, "reference"):
                distribution().gather(-1, target[..., None])
        with active(base, "policy"):
            everything = distribution()
        with active(base, "value"):
            states = base.model(**inputs).last_hidden_state[:, -length - 1 : -1]
        values = ppo.value_head(states)[..., 0]  # type: ignore[misc]
        ratio = (everything.gather(-1, target[..., None])[..., 0] - old_logprobs).exp()
        policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - ppo.clip, 1 + ppo.clip))
        near = old_values + (values - old_values).clamp(-ppo.value_clip, ppo.value_clip)
        value = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
        entropy = -(everything.exp() * everything).sum(-1)
        parts = {"policy_loss": policy, "value_loss": value, "entropy": entropy}
        loss = ppo.total({name: (part * mask).sum() for name, part in parts.items()}) / mask.sum()
        loss.backward()
        return loss

    model = ppo.vlm.model
    assert model is not None  # noqa: S101
    parameters = [p for p in (*model.parameters(), *ppo.value_head.parameters()) if p.requires_grad]  # type: ignore[union-attr]
    return Side(backward, lora_parameters(model), torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0))


def benchmark_ppo(shape: Shape, folder: Path, repeats: int, questions: int = 1) -> list[Row]:
    """Compares the inner step of PPO (forward, backward, optimizer) with three passes over padded responses.

    Args:
        shape: see :class:`Shape`.
        folder: the folder of the model.
        repeats: number of measured repetitions.
        questions: number of questions about each image.
    """
    _, on_adapter, rollout = our_ppo(shape, folder, "adapter", questions=questions)
    _, on_policy, _ = our_ppo(shape, folder, "policy", rollout)
    published, _, _ = our_ppo(shape, folder, "adapter", rollout)
    without, _, _ = our_ppo(shape, folder, "adapter", rollout)
    sides = {
        "three passes": three_passes(shape, published, rollout),
        "two passes": three_passes(shape, without, rollout, reference=False),
        "value adapter": on_adapter,
        "value head on the policy": on_policy,
    }
    measure(sides, repeats)
    times = {name: side.seconds for name, side in sides.items()}
    published_times = times["three passes"]
    name = titled("PPO", questions)
    adapter, policy = (2.5, 5.0) if questions == 1 else (8.5, 17.5)
    padded = f"three passes padded to {shape.response_length}"
    return [
        Row(f"{name}, value adapter : {padded}", published_times, times["value adapter"], adapter),
        Row(f"{name}, value head on the policy : {padded}", published_times, times["value head on the policy"], policy),
        Row(
            f"{name}, value adapter : the same without the reference pass",
            times["two passes"],
            times["value adapter"],
        ),
    ]
