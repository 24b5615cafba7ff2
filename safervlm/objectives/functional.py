"""The mathematics of the objectives: pure functions of tensors, nothing else.

Shapes: B sequences, T response tokens. ``mask`` is True at response tokens; what stands elsewhere changes nothing.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    r"""Direct preference optimisation, equation 7 of arXiv:2305.18290.

    .. math:: -\log\sigma\left(\beta\left[\log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}
        - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}\right]\right)

    Args:
        policy: (B, 2) log-probabilities of the chosen and the rejected response under the policy.
        reference: (B, 2) the same under the reference.
        beta: strength of the pull towards the reference.

    Returns:
        (B,) losses and (B, 2) implicit rewards of the chosen and the rejected response.
    """
    rewards = beta * (policy - reference)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards.detach()


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    r"""Generalised advantage estimation, equation 16 of arXiv:1506.02438.

    .. math:: \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \delta_t + \gamma\lambda A_{t+1}

    A sequence ends with its last response token: there V_{t+1} and A_{t+1} are 0.

    Args:
        rewards: (B, T) of each token.
        values: (B, T) the value before each token.
        mask: (B, T) contiguous from the first token.
        gamma: discount.
        lam: 1 for the whole return (low bias), 0 for one step (low variance).

    Returns:
        (B, T) advantages, 0 outside the mask; advantages + values are the returns.
    """
    following = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(following)
    advantages = torch.zeros_like(values)
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = following
    return advantages


def ppo_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    r"""The clipped surrogate, equation 7 of arXiv:1707.06347, of each token.

    .. math:: -\min\left(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_t\right), \qquad
        \rho_t = \pi(a_t|s_t) / \pi_{old}(a_t|s_t)

    Args:
        logprobs: (B, T) under the policy.
        old_logprobs: (B, T) under the policy that drew the tokens.
        advantages: (B, T).
        clip: the ratio's room on both sides of 1.

    Returns:
        (B, T) losses, and (B, T) True where the clip is at work (no gradient).
    """
    ratio = (logprobs - old_logprobs).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, clipped), clipped > free


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    r"""The clipped squared error of the value function, as in the reference implementation of arXiv:1707.06347.

    .. math:: \tfrac12\max\left((V_t - R_t)^2,\ (V^{old}_t + \mathrm{clip}(V_t - V^{old}_t, \pm\epsilon) - R_t)^2\right)

    Args:
        values: (B, T).
        old_values: (B, T) at the time of the rollout.
        returns: (B, T) what they should be.
        clip: the value's room on both sides of the old one.

    Returns:
        (B, T) losses, and (B, T) True where the clip is at work.
    """
    moved = values - old_values
    near = old_values + moved.clamp(-clip, clip)
    free, clipped = (values - returns).square(), (near - returns).square()
    # Within the room the two differ by rounding alone.
    return 0.5 * torch.maximum(free, clipped), (clipped > free) & (moved.abs() > clip)


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """(...) what each token adds to an estimate of KL(old || new): k3 of http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: (...) of the drawn tokens, under the new policy.
        old_logprobs: (...) under the policy that drew them.
    """
    ratio = logprobs - old_logprobs
    return ratio.exp() - 1 - ratio


def sequence_rewards(
    judged: Tensor,
    low: Tensor,
    high: Tensor,
    stopped: Tensor,
    lengths: Tensor,
    response_length: int,
    no_eos_penalty: float,
    length_bonus: float,
) -> Tensor:
    """What a whole response earns, by the published formula.

    Args:
        judged: (B,) minus the judge's cross entropy against the image's label.
        low: the smallest of the whole batch, all processes together.
        high: the largest. Where all are equal, 0.5 is earned (the published implementation divides 0 by 0).
        stopped: (B,) True where the response ended by itself.
        lengths: (B,) tokens of each response.
        response_length: the most tokens that a response may have.
        no_eos_penalty: added where the response did not end by itself.
        length_bonus: earned by a response of ``response_length`` tokens, a shorter one its share.
    """
    spread = high - low
    normalised = torch.where(spread > 0, (judged - low) / spread.clamp(min=torch.finfo(judged.dtype).tiny), 0.5)
    return normalised + no_eos_penalty * ~stopped + length_bonus * lengths / response_length


def token_rewards(
    sequence: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float, scale: float
) -> Tensor:
    """The reward of each token: a price for leaving the reference, and the response's reward at its last token.

    The divergence is the k1 estimate log pi - log pi_ref, cut at 0 as published.

    Args:
        sequence: (B,) see :func:`sequence_rewards`.
        logprobs: (B, T) under the policy that drew the tokens.
        reference: (B, T) under the reference.
        mask: (B, T) contiguous from the first token.
        kl_coef: price of a nat.
        scale: everything is multiplied by it.
    """
    rewards = -kl_coef * (logprobs - reference).clamp(min=0) * mask
    last = mask.sum(-1, keepdim=True) - 1
    return scale * rewards.scatter_add(-1, last, sequence[:, None])


def whiten(values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Shifts and scales to mean 0 and variance 1 over the response tokens.

    Args:
        values: (B, T).
        mask: (B, T).
        total: adds a scalar up over all processes.

    Returns:
        (B, T) whitened values, 0 outside the mask.
    """
    count = total(mask.sum())
    mean = total((values * mask).sum()) / count
    variance = total(((values - mean).square() * mask).sum()) / count
    return (values - mean) * (variance + 1e-8).rsqrt() * mask


def explained_variance(returns: Tensor, values: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect value function, 0 for a constant; NaN if returns are.

    Args:
        returns: (N,).
        values: (N,).
    """
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0)


def in_parts(rows: Tensor, size: int, fewest: int) -> tuple[Tensor, ...]:
    """Parts of ``size`` rows, as many as ``fewest`` rows make; whatever is more stands in the last one."""
    return rows.tensor_split(list(range(size, fewest, size)))
