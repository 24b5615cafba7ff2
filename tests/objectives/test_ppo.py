"""PPO against a reference computation: plain forward passes of the Hugging Face model, one response each, plain loops.

The reference uses nothing of the package except the sampled responses and the order of the mini-batches.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import Hand, Run, bias_head, judged_by_hand, most_probable
from torch import Tensor, nn

from safervlm.judging.classifier import Judge
from safervlm.objectives import PPO
from safervlm.records import THINKING_UNFINISHED, Example, Question
from safervlm.vlm.llava import Llava
from safervlm.vlm.packing import pack
from safervlm.vlm.thinking import COMMON, Thinking

TEMPERATURE, LENGTH, EPOCHS, MINI = 0.8, 7, 2, 3
SETTINGS: dict[str, Any] = {
    "kl_coef": 0.3,
    "entropy_coef": 0.05,
    "vf_coef": 0.2,
    "clip": 0.2,
    "value_clip": 0.15,
    "gamma": 0.97,
    "lam": 0.9,
    "ppo_epochs": EPOCHS,
    "mini_batch_size": MINI,
    "micro_batch_size": 2,
    "temperature": TEMPERATURE,
    "response_length": LENGTH,
    "length_bonus": 1.5,
    "no_eos_penalty": -2.0,
    "reward_scale": 0.5,
    "max_grad_norm": 1e6,
    "lr": 0.02,
    "warmup_steps": 0,
}


@pytest.fixture
def make_ppo(llava: Callable[[], Llava], perturb: Callable[[nn.Module], None], tiny_judges: Path) -> Callable[..., PPO]:
    """``make_ppo(**settings)``: a PPO with effective adapters and value head, whose responses often end early."""

    def make(**settings: Any) -> PPO:
        folder = tiny_judges / "alignment"
        judge = Judge(checkpoint=str(folder / "epoch_10.pt"), base=str(folder))
        ppo = PPO(llava(), judge, **(SETTINGS | settings))
        ppo.configure_model()
        bias_head(ppo.vlm, {ppo.vlm.eos_token_ids[0]: 5.0})
        perturb(ppo)
        return ppo

    return make


@pytest.fixture
def run(
    make_ppo: Callable[..., PPO], fit_rollouts: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """``run(**settings)``: fits one batch of five questions."""

    def run(
        judge: Callable[[Sequence[str]], Tensor] | None = None,
        prepare: Callable[[PPO], Any] = lambda ppo: None,
        epochs: int = 1,
        **settings: Any,
    ) -> Run:
        ppo = make_ppo(**settings)
        prepare(ppo)
        if judge is not None:
            monkeypatch.setattr(ppo.judge, "judge", judge)
        return fit_rollouts(ppo, 5, epochs)

    return run


@pytest.mark.parametrize("value_on", ["adapter", "policy"])
def test_rollout_and_updates_equal_the_reference_computation(
    value_on: str, run: Callable[..., Run], tiny_judges: Path
) -> None:
    done = run(value_on=value_on)
    (rollout,), ppo = done.rollouts, done.objective
    rows = range(len(rollout.answers))
    lengths = [len(answer.token_ids) for answer in rollout.answers]
    stopped = [answer.token_ids[-1] == ppo.vlm.eos_token_ids[0] for answer in rollout.answers]
    assert len(set(lengths)) > 2  # padding
    assert len(set(stopped)) == 2  # some end by themselves, some are cut off
    assert [answer.finish_reason == "stop" for answer in rollout.answers] == stopped

    # The rollout: the models before the first step.
    hand = Hand(ppo, TEMPERATURE)
    hand.load(done.steps.weights[0])
    with torch.no_grad():
        seen = [hand.tokens(rollout, row) for row in rows]
    texts = [hand.tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip() for answer in rollout.answers]
    labels = [question.answer for question in rollout.batch.questions]
    judged = [judged_by_hand(tiny_judges / "alignment", text, label) for text, label in zip(texts, labels, strict=True)]
    earned, advantages, returns, kl = [], [], [], []
    for row in rows:
        reward = (judged[row] - min(judged)) / (max(judged) - min(judged))
        reward += 0.0 if stopped[row] else SETTINGS["no_eos_penalty"]
        reward += SETTINGS["length_bonus"] * (lengths[row] / LENGTH)
        earned.append(reward)
        tokens = seen[row]
        divergence = [token["logprob"].item() - token["reference"] for token in tokens]
        kl.append(sum(divergence))
        rewards = [-SETTINGS["kl_coef"] * max(0.0, nats) for nats in divergence]
        rewards[-1] += reward
        rewards = [SETTINGS["reward_scale"] * reward for reward in rewards]
        values = [token["value"].item() for token in tokens]
        advantage, found = 0.0, []
        for t in reversed(range(len(tokens))):
            following = values[t + 1] if t + 1 < len(tokens) else 0.0
            delta = rewards[t] + SETTINGS["gamma"] * following - values[t]
            advantage = delta + SETTINGS["gamma"] * SETTINGS["lam"] * advantage
            found.insert(0, advantage)
        advantages.append(found)
        returns.append([a + v for a, v in zip(found, values, strict=True)])
    everything = np.concatenate(advantages)
    whitened = [(np.array(found) - everything.mean()) / math.sqrt(everything.var() + 1e-8) for found in advantages]

    for row in rows:
        length, tokens = lengths[row], seen[row]
        assert rollout.mask[row].tolist() == [True] * length + [False] * (max(lengths) - length)
        for ours, expected in (
            (rollout.logprobs, [token["logprob"].item() for token in tokens]),
            (rollout.values, [token["value"].item() for token in tokens]),
            (rollout.returns, returns[row]),
            (rollout.advantages, whitened[row].tolist()),
        ):
            assert ours[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        for padded in (rollout.logprobs, rollout.values, rollout.advantages):
            assert not padded[row, length:].any()

    # The updates: each optimizer step's gradient, from the weights before it.
    old = [[(token["logprob"].item(), token["value"].item()) for token in tokens] for tokens in seen]
    generator = torch.Generator().manual_seed(done.orders[0])
    images = [[0, 1], [2, 3], [4]]  # the responses to the questions about each image
    orders = [[row for image in torch.randperm(3, generator=generator) for row in images[image]] for _ in range(EPOCHS)]
    minis = [order[start : start + MINI] for order in orders for start in range(0, 5, MINI)]
    assert len(done.steps.gradients) == len(minis) == EPOCHS * 2
    sums = dict.fromkeys(["policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction"], 0.0)
    sums["approx_kl"] = 0.0
    clipped_at = set()
    for mini, weights, gradients in zip(minis, done.steps.weights, done.steps.gradients, strict=True):
        hand.load(weights)
        loss: Any = 0.0
        for row in mini:
            for t, token in enumerate(hand.tokens(rollout, row)):
                old_logprob, old_value = old[row][t]
                advantage = float(whitened[row][t])
                ratio = (token["logprob"] - old_logprob).exp()
                above, below = ratio.item() > 1 + 0.2, ratio.item() < 1 - 0.2
                policy_clipped = above if advantage > 0 else below
                policy = -ratio * advantage
                if policy_clipped:
                    clipped_at.add("above" if above else "below")
                    policy = torch.tensor(-(1.2 if above else 0.8) * advantage)
                moved, target = token["value"].item() - old_value, returns[row][t]
                near = old_value + min(max(moved, -0.15), 0.15)
                value = (token["value"] - target) ** 2 / 2
                value_clipped = abs(moved) > 0.15 and abs(near - target) > abs(token["value"].item() - target)
                if value_clipped:
                    value = torch.tensor((near - target) ** 2 / 2)
                loss = loss + policy + SETTINGS["vf_coef"] * value - SETTINGS["entropy_coef"] * token["entropy"]
                sums["policy_loss"] += policy.item()
                sums["value_loss"] += value.item()
                sums["entropy"] += token["entropy"].item()
                sums["clip_fraction"] += policy_clipped
                sums["value_clip_fraction"] += value_clipped
                sums["approx_kl"] += ratio.item() - 1 - math.log(ratio.item())
        (loss / sum(lengths[row] for row in mini)).backward()
        expected_gradients = hand.gradients()
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4, msg=name)
    assert clipped_at == {"above", "below"}  # ratios outside the clipping range on both sides of 1
    assert sums["value_clip_fraction"] > 3
    assert any(gradients["value_head.weight"].abs().max() > 1e-3 for gradients in done.steps.gradients)

    # Logged metrics.
    metrics, count = done.steps.metrics, EPOCHS * sum(lengths)
    values = np.array([value for row in old for _, value in row])
    targets = np.concatenate(returns)
    right = [text_label == label for text_label, label in zip(most_probable(tiny_judges, texts), labels, strict=True)]
    expected = {name: total / count for name, total in sums.items()} | {
        "reward": np.mean(earned),
        "judged": np.mean(judged),
        "accuracy": np.mean(right),
        "kl": np.mean(kl),
        "length": np.mean(lengths),
        "stopped": np.mean(stopped),
        "explained_variance": 1 - (targets - values).var() / targets.var(),
    }
    assert {name: metrics[f"train/{name}"] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_the_micro_batch_changes_nothing(run: Callable[..., Run]) -> None:
    runs = [run(micro_batch_size=size) for size in (1, 2, 5)]
    whole = runs[-1]
    for other in runs[:-1]:
        assert other.rollouts[0].answers == whole.rollouts[0].answers
        torch.testing.assert_close(other.rollouts[0].advantages, whole.rollouts[0].advantages, atol=1e-4, rtol=0)
        for ours, theirs in zip(other.steps.gradients, whole.steps.gradients, strict=True):
            for name, gradient in ours.items():
                torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-3, msg=name)
        assert other.steps.metrics == pytest.approx(whole.steps.metrics, abs=1e-4)


def test_gradients_are_clipped_to_the_norm(run: Callable[..., Run]) -> None:
    free, clipped = (run(max_grad_norm=norm).steps.gradients[0] for norm in (1e6, 0.01))

    def norm(gradients: dict[str, Tensor]) -> float:
        return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))

    assert norm(free) > 0.02
    assert norm(clipped) == pytest.approx(0.01, rel=1e-3)
    for name, gradient in clipped.items():
        torch.testing.assert_close(gradient, free[name] * 0.01 / norm(free), atol=1e-7, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("value_on", "names"), [("policy", "value_head"), ("adapter", r".value. or value_head")])
def test_value_loss_has_no_gradient_in_the_policy(value_on: str, names: str, run: Callable[..., Run]) -> None:
    done = run(value_on=value_on, ppo_epochs=1)
    loss = done.objective.losses(done.rollouts[0], torch.arange(3))["value_loss"]
    parameters = {name: p for name, p in done.objective.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    reached = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    assert reached == {name for name in parameters if any(part in name for part in names.split(" or "))}


@pytest.mark.parametrize("value_on", ["adapter", "policy"])
def test_policy_loss_has_no_gradient_in_the_value_function(value_on: str, run: Callable[..., Run]) -> None:
    done = run(value_on=value_on, ppo_epochs=1)
    sums = done.objective.losses(done.rollouts[0], torch.arange(3))
    parameters = {name: p for name, p in done.objective.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(sums["policy_loss"] + sums["entropy"], list(parameters.values()), allow_unused=True)
    reached = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    assert reached == {name for name in parameters if ".default." in name}


def test_the_judge_stays_frozen_and_in_eval_mode(run: Callable[..., Run], tiny_judges: Path) -> None:
    done = run(epochs=2)
    judge = done.objective.judge
    done.objective.train()
    assert done.objective.vlm.training
    assert not any(module.training for module in judge.modules())
    saved = torch.load(tiny_judges / "alignment" / "epoch_10.pt", weights_only=True)
    optimised = {id(p) for group in done.objective.optimizers().param_groups for p in group["params"]}
    parameters = dict(judge.named_parameters())
    assert len(parameters) > 10
    for name, parameter in parameters.items():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert id(parameter) not in optimised
        assert torch.equal(parameter, saved[name])
    assert not any("judge" in name for name in done.objective.state_dict())


def judge_all_alike(texts: Sequence[str]) -> Tensor:
    return torch.full((len(texts), 3), math.log(1 / 3))


def test_equal_judge_scores_give_rewards_of_one_half(run: Callable[..., Run]) -> None:
    done = run(judge=judge_all_alike, response_length=40)
    rollout, lengths = done.rollouts[0], done.rollouts[0].mask.sum(-1)
    assert lengths.max() < 40
    stopped = torch.tensor([answer.finish_reason == "stop" for answer in rollout.answers])
    expected = 0.5 + 1.5 * lengths / 40 - 2.0 * ~stopped
    assert done.steps.metrics["train/reward"] == pytest.approx(expected.mean().item(), abs=1e-6)
    assert all(math.isfinite(value) for value in done.steps.metrics.values())
    assert all(p.isfinite().all() for p in done.objective.parameters())


@pytest.mark.parametrize("unfinished", [{1, 3}, {0, 1, 2, 3, 4}])
def test_unfinished_thinking_gets_the_lowest_judge_score(
    unfinished: set[int], run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge prefers the empty text to any other."""
    monkeypatch.setattr(Llava, "thinking", Thinking(COMMON))

    def prepare(ppo: PPO) -> None:
        generate = ppo.vlm.generate

        def cut(*args: Any) -> list[Any]:
            answers = generate(*args)
            return [
                replace(answer, text="", finish_reason=THINKING_UNFINISHED) if row in unfinished else answer
                for row, answer in enumerate(answers)
            ]

        ppo.vlm.generate = cut

    def judge(texts: Sequence[str]) -> Tensor:
        scores = [0.0 if not text else -1.0 - row for row, text in enumerate(texts)]
        return torch.tensor(scores)[:, None].expand(-1, 3)

    done = run(judge=judge, prepare=prepare, response_length=40)
    (rollout,), metrics = done.rollouts, done.steps.metrics
    stopped = [answer.finish_reason == "stop" for answer in rollout.answers]
    judged = {row: -1.0 - row for row in range(5) if row not in unfinished}
    spread = {row: (value + 5.0) / 4.0 for row, value in judged.items()}  # the others are from -1 to -5
    earned = [
        (spread.get(row, 0.0) if judged else 0.5)
        + (1.5 * len(answer.token_ids) / 40 if row in judged else 0.0)
        - 2.0 * (not stopped[row])
        for row, answer in enumerate(rollout.answers)
    ]
    assert metrics["train/reward"] == pytest.approx(np.mean(earned), abs=1e-6)
    assert metrics["train/judged"] == pytest.approx(sum(judged.values()) / max(1, len(judged)))
    assert metrics["train/thinking_unfinished"] == pytest.approx(len(unfinished) / 5)
    assert all(math.isfinite(value) for value in metrics.values())


def test_length_bonus_counts_only_the_answer(run: Callable[..., Run]) -> None:
    """The answer of each response is short, independently of its reasoning."""

    def prepare(ppo: PPO) -> None:
        generate = ppo.vlm.generate

        def thinking(*args: Any) -> list[Any]:
            return [replace(answer, text="Yes", reasoning="An image.") for answer in generate(*args)]

        ppo.vlm.generate = thinking

    done = run(judge=judge_all_alike, prepare=prepare, response_length=40)
    (rollout,), tokenizer = done.rollouts, done.objective.vlm.tokenizer
    answer = len(tokenizer("Yes", add_special_tokens=False).input_ids)
    stopped = [answer.finish_reason == "stop" for answer in rollout.answers]
    lengths = [len(each.token_ids) for each in rollout.answers]
    assert max(lengths) > answer + 1
    earned = [
        0.5 + 1.5 * min(answer + ended, length) / 40 - 2.0 * (not ended)
        for ended, length in zip(stopped, lengths, strict=True)
    ]
    assert done.steps.metrics["train/reward"] == pytest.approx(np.mean(earned), abs=1e-6)
    assert done.steps.metrics["train/length"] == pytest.approx(np.mean(lengths), abs=1e-6)


def test_equal_advantages_give_zero_policy_gradients(run: Callable[..., Run]) -> None:
    """One token each, equal judge scores, values of 0: whitening has no variance to divide by."""
    done = run(
        judge=judge_all_alike,
        prepare=lambda ppo: [nn.init.zeros_(parameter) for parameter in ppo.value_head.parameters()],
        response_length=1,
        no_eos_penalty=0.0,
        kl_coef=0.0,
        entropy_coef=0.0,
    )
    assert done.rollouts[0].advantages.abs().max() < 1e-3
    first = done.steps.gradients[0]
    assert max(gradient.abs().max() for name, gradient in first.items() if ".default." in name) < 1e-4
    assert first["value_head.bias"].abs() > 1e-3
    assert all(p.isfinite().all() for p in done.objective.parameters())


def test_suppressed_tokens_are_never_sampled_and_have_no_probability(
    make_ppo: Callable[..., PPO], make_questions: Callable[[int], list[Question]]
) -> None:
    ppo = make_ppo()
    image, unknown = ppo.vlm.image_token_id, 3
    beyond = ppo.vlm.base.lm_head.out_features - 1
    bias_head(ppo.vlm, dict.fromkeys((image, unknown, beyond), 1e3))  # the model would generate nothing else
    batch = ppo.collator([Example(question) for question in make_questions(5)])
    answers = ppo.vlm.generate(batch, ppo.sampling, seed=0)
    drawn = {token for answer in answers for token in answer.token_ids}
    assert len(drawn) > 5
    assert not drawn & {image, unknown, beyond}
    for token in (unknown, beyond):  # (a text with an image's placeholder cannot be encoded)
        batch.packed = pack(batch.prompt_ids, [[[token, ppo.vlm.eos_token_ids[0]]] for _ in range(5)])
        wanted = ppo.vlm.score(batch).logprobs[:, 0].exp()
        scores = ppo.vlm.score(batch, sampling=ppo.sampling, entropy=True)
        assert wanted.max() > 0.3
        assert scores.logprobs[:, 0].exp().tolist() == [0.0] * 5
        assert scores.entropy is not None
        assert scores.entropy.isfinite().all()


def test_the_rollout_is_sampled_from_seed_epoch_and_batch(run: Callable[..., Run]) -> None:
    # At a learning rate of 0 two epochs differ only by the seed.
    first, again, other = (run(epochs=2, lr=1e-30, ppo_epochs=1, seed=seed) for seed in (0, 0, 1))
    texts = [[[answer.text for answer in rollout.answers] for rollout in r.rollouts] for r in (first, again, other)]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[2][0]
    assert texts[0][0] != texts[0][1]
    assert len(set(first.orders)) == 2


def test_the_value_function_starts_at_zero(llava: Callable[[], Llava], tiny_judges: Path) -> None:
    folder = tiny_judges / "alignment"
    ppo = PPO(llava(), Judge(checkpoint=str(folder / "epoch_10.pt"), base=str(folder)))
    ppo.configure_model()
    assert ppo.value_head is not None
    assert not any(p.any() for p in ppo.value_head.parameters())
    assert all(p.requires_grad for p in ppo.value_head.parameters())
