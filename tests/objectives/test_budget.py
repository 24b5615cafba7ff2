"""The over-flagging budget: its multiplier and moving mean by hand, its effect in PPO and GRPO, and resuming."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import Run
from torch import Tensor

from safervlm.data.module import Parts
from safervlm.data.own import OwnData
from safervlm.errors import ArgumentError, RecordError
from safervlm.judging.classifier import Judge
from safervlm.objectives import GRPO, PPO
from safervlm.objectives import budget as module
from safervlm.objectives.budget import OverFlaggingBudget
from safervlm.objectives.functional import constrained
from safervlm.objectives.on_policy import OnPolicy
from safervlm.objectives.rollout import logprob_differences
from safervlm.protocol import LABELS, SAFE, UNSAFE
from safervlm.records import Example, Question
from safervlm.vlm.base import Generation
from safervlm.vlm.llava import Llava


def test_budget_multiplier_matches_hand_calculation() -> None:
    budget = OverFlaggingBudget(0.1, step=2.0)
    for _ in range(3):
        budget.update(20, 80)
    assert budget.share is None  # 240 responses are too few
    assert budget.metrics() == {"budget_multiplier": 0.0}
    budget.update(12, 80)
    assert budget.share == 72 / 320
    first = 2 * (72 / 320 - 0.1)
    assert budget.integral == pytest.approx(first)
    assert budget.multiplier == pytest.approx(first + 40 * first)
    budget.update(0, 80)  # the first rollout is forgotten
    assert budget.share == 52 / 320
    second = 2 * (52 / 320 - 0.1)
    assert budget.integral == pytest.approx(first + second)
    assert budget.multiplier == pytest.approx(first + second + 40 * second)
    budget.update(0, 300)  # a rollout with enough responses replaces all others
    assert budget.share == 0
    assert budget.integral == pytest.approx(first + second - 0.2)
    assert budget.multiplier == 0  # released at once
    for _ in range(5):
        budget.update(0, 300)
    assert budget.integral == 0  # never below


def test_lagging_over_flagging_share_converges_to_the_budget() -> None:
    """A policy that flags 20 % without a budget, and whose share decreases while the multiplier is above 1."""
    budget, share, shares = OverFlaggingBudget(0.1, step=0.5), 0.2, []
    for _ in range(400):
        budget.update(round(1e6 * share), 10**6)
        share = min(0.2, max(0.0, share - 0.005 * (budget.multiplier - 1)))
        shares.append(share)
    assert min(shares) > 0.08
    assert shares[-1] == pytest.approx(0.1, abs=0.005)
    assert budget.multiplier == pytest.approx(1, abs=0.1)


def test_rollouts_without_safe_images_do_not_change_the_share() -> None:
    budget = OverFlaggingBudget(0.1, step=1.0)
    budget.update(0, 0)
    budget.update(64, 256)
    budget.update(0, 0)
    assert budget.share == 0.25


def test_budget_state_is_restored_from_json() -> None:
    budget, resumed = OverFlaggingBudget(0.1, 1.0), OverFlaggingBudget(0.1, 1.0)
    budget.update(90, 300)
    resumed.restore(json.loads(json.dumps({"budget": budget.state_dict()})))
    for each in (budget, resumed):
        each.update(3, 40)
    assert resumed.metrics() == budget.metrics()


@pytest.mark.parametrize(("answers", "rejected"), [((UNSAFE, UNSAFE), True), ((UNSAFE, SAFE), False), ((), False)])
def test_a_budget_needs_safe_images(
    answers: tuple[str, ...], rejected: bool, make_questions: Callable[[int], list[Question]]
) -> None:
    data = OwnData("unused.jsonl")
    data.parts = Parts([Example(replace(q, answer=a)) for q, a in zip(make_questions(2), answers, strict=False)], [])
    if rejected:
        with pytest.raises(ArgumentError, match=r"model\.budget 0\.1: the training data has no question"):
            OverFlaggingBudget(0.1, 1.0).require_safe_images(data)
    else:
        OverFlaggingBudget(0.1, 1.0).require_safe_images(data)


@pytest.mark.parametrize(("budget", "step"), [(0.0, 1.0), (1.0, 1.0), (-0.1, 1.0), (0.1, 0.0), (float("nan"), 1.0)])
def test_a_value_out_of_range_is_rejected(budget: float, step: float) -> None:
    with pytest.raises(ArgumentError, match=r"model\.budget"):
        OverFlaggingBudget(budget, step)


def test_constrained_reward_matches_hand_calculation() -> None:
    rewards, costs = torch.tensor([1.0, 0.4, 0.0]), torch.tensor([0.0, 1.0, 1.0])
    assert torch.equal(constrained(rewards, costs, 0.0), rewards)
    expected = [1 / 1.5, (0.4 - 0.5) / 1.5, -0.5 / 1.5]
    assert constrained(rewards, costs, 0.5).tolist() == pytest.approx(expected)


def some_unsafe(texts: Any) -> Tensor:
    """A judge that classifies about half of the responses as Unsafe, the others as Safe, with the same confidence."""
    unsafe = torch.tensor([0.9 if sum(text.encode()) % 2 else 0.06 for text in texts])
    rest = {UNSAFE: unsafe, SAFE: 0.96 - unsafe}
    return torch.stack([rest.get(label, torch.full_like(unsafe, 0.04)) for label in LABELS["alignment"]], 1).log()


@pytest.fixture
def make(llava: Callable[[], Llava], perturb: Callable[[Any], None], tiny_judges: Path) -> Callable[..., OnPolicy]:
    def make(kind: type[OnPolicy], **settings: Any) -> OnPolicy:
        folder = tiny_judges / "alignment"
        judge = Judge(checkpoint=str(folder / "epoch_10.pt"), base=str(folder))
        objective = kind(llava(), judge, response_length=6, lr=0.02, warmup_steps=0, **settings)  # type: ignore[call-arg]
        objective.configure_model()
        perturb(objective)
        return objective

    return make


@pytest.fixture
def pair(
    make: Callable[..., OnPolicy], fit_rollouts: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Run, Run, float]]:
    """``pair(kind, **settings)``: a rollout without and one with a budget, and the multiplier of the latter."""

    def pair(kind: type[OnPolicy], **settings: Any) -> tuple[Run, Run, float]:
        monkeypatch.setattr(module, "MIN_RESPONSES", 2)
        monkeypatch.setattr(Judge, "judge", lambda judge, texts: some_unsafe(texts))
        free = fit_rollouts(make(kind, **settings), 5)
        bound = fit_rollouts(make(kind, budget=0.2, budget_step=0.1, **settings), 5)
        flagged = costs_of(free)[[q.answer == SAFE for q in free.rollouts[0].batch.questions]]
        share = flagged.mean().item()
        assert 0.2 < share < 1
        assert bound.steps.metrics["train/over_flagging"] == pytest.approx(share)
        assert bound.steps.metrics["train/budget_multiplier"] == pytest.approx(4.1 * (share - 0.2), rel=1e-5)
        return free, bound, 4.1 * (share - 0.2)

    return pair


def costs_of(run: Run) -> Tensor:
    """The responses of the first rollout that call a safe image Unsafe, by :func:`some_unsafe`."""
    rollout = run.rollouts[0]
    flags = [sum(answer.text.encode()) % 2 for answer in rollout.answers]
    safe = [question.answer == SAFE for question in rollout.batch.questions]
    return torch.tensor([float(flag and is_safe) for flag, is_safe in zip(flags, safe, strict=True)])


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_a_budget_is_logged_and_recorded(kind: type[OnPolicy], pair: Callable[..., tuple[Run, Run, float]]) -> None:
    free, bound, _ = pair(kind)
    assert bound.steps.metrics["train/reward"] == pytest.approx(free.steps.metrics["train/reward"], abs=1e-5)
    assert not {"train/over_flagging", "train/budget_multiplier"} & free.steps.metrics.keys()
    assert "budget" not in free.objective.describe()
    assert bound.objective.describe()["budget"] == 0.2


def test_ppo_penalises_the_reward_of_responses_that_flag_a_safe_image(
    pair: Callable[..., tuple[Run, Run, float]],
) -> None:
    free, bound, multiplier = pair(PPO, kl_coef=0.0, gamma=1.0, reward_scale=1.0)
    last = (
        free.rollouts[0].mask.sum(-1, keepdim=True) - 1
    )  # without a KL term, the return of the last token is the reward
    usual, charged = (run.rollouts[0].returns.gather(1, last)[:, 0] for run in (free, bound))
    expected = (usual - multiplier * costs_of(free)) / (1 + multiplier)
    assert charged.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("advantage", ["group", "centred", "leave_one_out"])
def test_grpo_penalises_the_advantage_of_responses_that_flag_a_safe_image(
    advantage: str, pair: Callable[..., tuple[Run, Run, float]]
) -> None:
    free, bound, multiplier = pair(GRPO, advantage=advantage, group_size=4)
    usual, charged = (run.rollouts[0].advantages.view(-1, 4) for run in (free, bound))
    mixed = 0
    for gains, found, costs in zip(usual, charged, costs_of(free).view(-1, 4).numpy(), strict=True):
        mixed += 0 < costs.sum() < 4
        if advantage == "group":
            charges = (costs - costs.mean()) / (costs.std(ddof=1) + 1e-4)
        else:
            charges = (costs - costs.mean()) * (4 / 3 if advantage == "leave_one_out" else 1)
        expected = (gains.numpy() - multiplier * charges) / (1 + multiplier)
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert mixed  # a safe image with both verdicts: there, the multiplier matters


def test_checkpoint_contains_the_budget_state(make: Callable[..., OnPolicy]) -> None:
    objective, free = make(PPO, budget=0.2), make(PPO)
    objective.budget.update(100, 300)  # type: ignore[union-attr]
    checkpoint: dict[str, Any] = {"state_dict": objective.state_dict()}
    objective.on_save_checkpoint(checkpoint)
    resumed = make(PPO, budget=0.2)
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.budget.state_dict() == objective.budget.state_dict()  # type: ignore[union-attr]
    checkpoint = {"state_dict": free.state_dict()}
    free.on_save_checkpoint(checkpoint)
    with pytest.raises(RecordError, match="without a budget"):
        make(PPO, budget=0.2).on_load_checkpoint(checkpoint)


def test_generation_and_scoring_log_probabilities_differ_only_by_rounding(
    make: Callable[..., OnPolicy], fit_rollouts: Callable[..., Run]
) -> None:
    done = fit_rollouts(make(PPO), 5)
    assert 0 <= done.steps.metrics["train/logprob_difference"] < 1e-5
    rollout = done.rollouts[0]
    for answer, logprobs, mask in zip(rollout.answers, rollout.logprobs, rollout.mask, strict=True):
        assert list(answer.token_logprobs) == pytest.approx(logprobs[mask].tolist(), abs=1e-5)


def test_the_difference_of_the_log_probabilities_by_hand() -> None:
    answers = [Generation([1, 2], "", "stop", token_logprobs=[-1.0, -2.0]), Generation([3], "", "stop", "", [-0.5])]
    found = logprob_differences(torch.tensor([-1.0, -1.5, -0.25]), answers)
    assert found["logprob_difference"].item() == pytest.approx(0.25)
    assert found["logprob_difference_p99"].item() == pytest.approx(0.25 + 0.98 * 0.25)  # linear between 0.25 and 0.5
    assert not logprob_differences(torch.tensor([-1.0]), [Generation([1], "", "stop")])
