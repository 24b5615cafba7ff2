"""The functions of objectives.functional against hand computations, plain Python loops and autograd."""

import math

import pytest
import torch

from safervlm.objectives.functional import (
    approx_kl,
    dpo_loss,
    explained_variance,
    gae,
    group_advantages,
    importance_ratio,
    ppo_policy_loss,
    ppo_value_loss,
    sequence_rewards,
    summands,
    token_rewards,
    token_weights,
)


def test_dpo_loss_by_hand() -> None:
    policy, reference = torch.tensor([[-10.0, -12.0], [-5.0, -1.0]]), torch.tensor([[-11.0, -11.0], [-5.0, -4.0]])
    losses, rewards = dpo_loss(policy, reference, beta=0.5)
    # margins: 0.5 * ((1) - (-1)) = 1 and 0.5 * (0 - 3) = -1.5
    expected = [math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(1.5))]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    assert rewards.tolist() == [[0.5, -0.5], [0.0, 1.5]]


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The defining sum: A_t = sum over k of (gamma lam)^k delta_{t+k}, over the sequence's own length."""
    length = len(rewards)
    deltas = [rewards[t] + (gamma * values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (0.99, 0.0)])
def test_gae_equals_its_defining_sum(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 4, 7]
    rewards, values = (torch.randn(3, 7, generator=generator) for _ in range(2))
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    advantages = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = plain_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        assert not advantages[row, length:].any()


def test_policy_loss_with_ratios_on_both_sides_of_one() -> None:
    ratios = torch.tensor([[1.5, 1.1, 0.5, 0.5, 1.5]])
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0]])
    logprobs = ratios.log().requires_grad_()
    losses, clipped = ppo_policy_loss(logprobs.exp(), advantages, clip=0.2)
    # -min(r A, clip(r) A), by hand
    assert losses.tolist()[0] == pytest.approx([-1.2, -1.1, -0.5, 0.8, 1.5], abs=1e-6)
    assert clipped.tolist() == [[True, False, False, True, False]]
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    # a clipped token has no gradient, another one -r A
    assert gradient.tolist()[0] == pytest.approx([0.0, -1.1, -0.5, 0.0, 1.5], abs=1e-6)


def test_policy_loss_with_a_higher_upper_clip() -> None:
    ratios = torch.tensor([[1.25, 1.5, 0.5, 0.75]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    losses, clipped = ppo_policy_loss(ratios, advantages, clip=0.2, clip_high=0.28)
    assert losses.tolist()[0] == pytest.approx([-1.25, -1.28, 0.8, 0.8], abs=1e-6)
    assert clipped.tolist() == [[False, True, True, True]]


def test_importance_ratios_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    old = torch.tensor([[-1.0, -2.0, 5.0], [-1.0, -1.0, -1.0]])
    new = torch.tensor([[-1.5, -1.0, -7.0], [-1.0, -2.0, -0.5]])
    # differences: -0.5, 1; 0, -1, 0.5
    expected = {
        "token": [[math.exp(-0.5), math.exp(1.0)], [1.0, math.exp(-1.0), math.exp(0.5)]],
        "answer": [[math.exp(0.25)] * 2, [math.exp(-0.5 / 3)] * 3],
        "product": [[math.exp(0.5)] * 2, [math.exp(-0.5)] * 3],
    }
    for level, rows in expected.items():
        ratios = importance_ratio(new, old, mask, level)
        assert [ratios[row, : len(values)].tolist() for row, values in enumerate(rows)] == [
            pytest.approx(values, abs=1e-6) for values in rows
        ], level
        assert ratios.isfinite().all()


@pytest.mark.parametrize("level", ["answer", "product"])
def test_sequence_level_ratio_passes_its_gradient_to_every_token(level: str) -> None:
    mask = torch.tensor([[True, True, False]])
    logprobs = torch.zeros(1, 3, requires_grad=True)
    ratios = importance_ratio(logprobs, torch.tensor([[0.3, -0.1, 0.0]]), mask, level)
    (gradient,) = torch.autograd.grad(ratios[0, 0], logprobs)
    ratio = math.exp(-0.1 if level == "answer" else -0.2)
    share = ratio / 2 if level == "answer" else ratio
    assert gradient.tolist()[0] == pytest.approx([share, share, 0.0], abs=1e-6)


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [-1.0, -1.0, 2.0]])
    centred = [[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]
    deviations = [math.sqrt((4 + 1 + 9) / 2), math.sqrt((1 + 1 + 4) / 2)]
    expected = {
        "group": [[a / (s + 1e-4) for a in row] for row, s in zip(centred, deviations, strict=True)],
        "centred": centred,
        # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; ...
        "leave_one_out": [[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]],
    }
    for kind, rows in expected.items():
        torch.testing.assert_close(group_advantages(rewards, kind), torch.tensor(rows), msg=kind)
    alike = group_advantages(torch.full((1, 3), 0.25), "group")
    assert alike.tolist() == [[0.0, 0.0, 0.0]]


def test_loss_averages_match_hand_calculation() -> None:
    mask = torch.tensor([[True, False, False], [True, True, True]])
    values = torch.tensor([[6.0, 99.0, 99.0], [1.0, 2.0, 3.0]])
    expected = {"answer": (6.0 + 2.0) / 2, "token": 12.0 / 4, "length": (6.0 / 10 + 6.0 / 10) / 2}
    for average, mean in expected.items():
        total = (values * token_weights(mask, average, longest=10)).sum()
        assert (total / summands(mask, average)).item() == pytest.approx(mean), average


def test_kl_of_the_sampled_tokens_by_hand() -> None:
    policy, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    expected = [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]
    assert approx_kl(reference, policy).tolist() == pytest.approx(expected, abs=1e-6)


def test_value_loss_with_the_clip_active_on_both_sides() -> None:
    values = torch.tensor([[2.0, 0.1, -2.0, 2.0]], requires_grad=True)
    returns = torch.tensor([[1.0, 1.0, -1.0, 3.0]])
    losses, clipped = ppo_value_loss(values, torch.zeros(1, 4), returns, clip=0.2)
    # near = 0.2, 0.1, -0.2, 0.2; max((v - R)^2, (near - R)^2) / 2
    assert losses.tolist()[0] == pytest.approx([0.5, 0.405, 0.5, 3.92], abs=1e-6)
    assert clipped.tolist() == [[False, False, False, True]]
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    assert gradient.tolist()[0] == pytest.approx([1.0, -0.9, -1.0, 0.0], abs=1e-6)


def test_sequence_rewards_by_hand() -> None:
    judged = torch.tensor([-3.0, -1.0, -2.0])
    rewards = sequence_rewards(
        judged,
        low=torch.tensor(-5.0),
        high=torch.tensor(-1.0),
        stopped=torch.tensor([True, True, False]),
        lengths=torch.tensor([8, 16, 32]),
        response_length=32,
        no_eos_penalty=-8.0,
        length_bonus=4.0,
    )
    assert rewards.tolist() == pytest.approx([0.5 + 1.0, 1.0 + 2.0, 0.75 - 8.0 + 4.0])


def test_equal_judge_scores_give_rewards_of_one_half() -> None:
    same = torch.full((3,), -2.0)
    rewards = sequence_rewards(
        same, same.min(), same.max(), torch.ones(3, dtype=torch.bool), torch.tensor([1, 2, 3]), 4, -8.0, 0.0
    )
    assert rewards.tolist() == [0.5, 0.5, 0.5]


def test_token_rewards_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0]])
    reference = torch.tensor([[-1.5, -1.0, 0.0], [-1.0, -3.0, -1.0]])
    rewards = token_rewards(torch.tensor([1.0, -1.0]), logprobs, reference, mask, kl_coef=0.1, scale=10.0)
    # kl: 0.5, -1 clamped to 0, none at padding; 0, 2, 0
    expected = [[-0.5, 10.0, 0.0], [0.0, -2.0, -10.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns + 3) == pytest.approx(1.0)
    assert explained_variance(returns, torch.zeros(3)) == pytest.approx(0.0)
    assert explained_variance(torch.ones(3), returns).isnan() or explained_variance(torch.ones(3), returns) < 0
