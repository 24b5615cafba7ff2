"""Losses, rewards and advantages of the objectives, as pure functions of tensors.

Shapes: B sequences, T response tokens. ``mask`` is True at response tokens; values outside the mask are ignored.
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
        beta: Strength of the regularisation towards the reference.

    Returns:
        (B,) losses and (B, 2) implicit rewards of the chosen and the rejected response.
    """
    rewards = beta * (policy - reference)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards.detach()


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    r"""Generalised advantage estimation, equation 16 of arXiv:1506.02438.

    .. math:: \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \delta_t + \gamma\lambda A_{t+1}

    A sequence ends with its last response token, where V_{t+1} and A_{t+1} are 0.

    Args:
        rewards: (B, T) reward of each token.
        values: (B, T) estimated value of the state before each token.
        mask: (B, T) True at response tokens, contiguous from the first one.
        gamma: Discount factor.
        lam: 1 for the whole return (low bias), 0 for the one-step error (low variance).

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


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: str) -> Tensor:
    r"""Importance ratio of each token, or of the whole response repeated at each of its tokens.

    .. math:: \text{token: } \rho_t = \frac{\pi(a_t|s_t)}{\pi_{old}(a_t|s_t)}, \qquad
        \text{answer: } \left(\prod_t \rho_t\right)^{1/T}, \qquad \text{product: } \prod_t \rho_t

    ``token`` is that of PPO and GRPO, ``answer`` that of GSPO (equation 7 of arXiv:2507.18071), ``product`` that of
    RLOO (arXiv:2402.14740).

    Args:
        logprobs: (B, T) log-probabilities under the current policy.
        old_logprobs: (B, T) log-probabilities under the policy that sampled the tokens.
        mask: (B, T) True at response tokens.
        level: ``token``, ``answer`` or ``product``.

    Returns:
        (B, T) ratios.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    if level == "token":
        return log_ratio.exp()
    total = log_ratio.sum(-1, keepdim=True)
    return (total / mask.sum(-1, keepdim=True) if level == "answer" else total).exp().expand_as(log_ratio)


def ppo_policy_loss(
    ratio: Tensor, advantages: Tensor, clip: float, clip_high: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Clipped surrogate loss of each token, equation 7 of arXiv:1707.06347.

    .. math:: -\min\left(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon_{high}) A_t\right)

    Args:
        ratio: (B, T) importance ratios, see :func:`importance_ratio`.
        advantages: (B, T) advantage of each token.
        clip: The clipping range epsilon of the ratio below 1, and above 1 unless ``clip_high`` is given.
        clip_high: The clipping range above 1 (equation 10 of arXiv:2503.14476); None uses ``clip``.

    Returns:
        (B, T) losses, and a (B, T) boolean tensor that is True where the clipped term is the larger loss (zero
        gradient).
    """
    high = clip if clip_high is None else clip_high
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + high)
    return torch.maximum(free, clipped), clipped > free


def group_advantages(rewards: Tensor, kind: str) -> Tensor:
    r"""Advantages of the responses to a question, from only the rewards of its group.

    .. math:: \text{group: } \frac{r_i - \bar r}{s + 10^{-4}}, \qquad \text{centred: } r_i - \bar r, \qquad
        \text{leave\_one\_out: } r_i - \frac{1}{G-1}\sum_{j \ne i} r_j = \frac{G}{G-1}(r_i - \bar r)

    with the mean :math:`\bar r` and the standard deviation s (with G - 1) of the group. ``group`` is that of GRPO
    (arXiv:2402.03300), ``centred`` that of Dr. GRPO (arXiv:2503.20783), ``leave_one_out`` that of RLOO
    (arXiv:2402.14740).

    Args:
        rewards: (Q, G) rewards of the G responses to each of Q questions.
        kind: ``group``, ``centred`` or ``leave_one_out``.

    Returns:
        (Q, G) advantages.
    """
    centred, size = rewards - rewards.mean(-1, keepdim=True), rewards.shape[-1]
    if kind == "group":
        return centred / (rewards.std(-1, keepdim=True) + 1e-4)
    return centred * size / (size - 1) if kind == "leave_one_out" else centred


def token_weights(mask: Tensor, average: str, longest: int) -> Tensor:
    r"""Weight of each token in the loss, before division by :func:`summands`.

    ``answer`` averages over the tokens of each response, then over the responses (GRPO, arXiv:2402.03300). ``token``
    averages over all tokens (DAPO, arXiv:2503.14476). ``length`` divides the sum over the tokens of each response by
    the maximum length, a constant, so that the length has no influence (Dr. GRPO, arXiv:2503.20783).

    Args:
        mask: (B, T) True at response tokens.
        average: ``answer``, ``token`` or ``length``.
        longest: Maximum number of tokens of a response.

    Returns:
        (B, T) weights, 0 outside the mask.
    """
    if average == "answer":
        return mask / mask.sum(-1, keepdim=True)
    return mask / (longest if average == "length" else 1)


def summands(mask: Tensor, average: str) -> Tensor:
    """Number of summands of an average: tokens for ``token``, otherwise responses.

    Args:
        mask: (B, T) True at response tokens.
        average: See :func:`token_weights`.

    Returns:
        Scalar.
    """
    return mask.sum() if average == "token" else mask.any(-1).sum()


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    r"""Clipped squared error of the value function, as in the reference implementation of arXiv:1707.06347.

    .. math:: \tfrac12\max\left((V_t - R_t)^2,\ (V^{old}_t + \mathrm{clip}(V_t - V^{old}_t, \pm\epsilon) - R_t)^2\right)

    Args:
        values: (B, T) current values.
        old_values: (B, T) values at the time of the rollout.
        returns: (B, T) regression targets.
        clip: The clipping range epsilon of the change of a value.

    Returns:
        (B, T) losses, and a (B, T) boolean tensor that is True where the clipped term is the larger one.
    """
    moved = values - old_values
    near = old_values + moved.clamp(-clip, clip)
    free, clipped = (values - returns).square(), (near - returns).square()
    # Within the clipping range the two terms differ by rounding only.
    return 0.5 * torch.maximum(free, clipped), (clipped > free) & (moved.abs() > clip)


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Computes each token's term of an estimate of KL(old || new): k3 of http://joschu.net/blog/kl-approx.html.

    The tokens are sampled from the old policy. With the reference as the new one, it is the KL term of GRPO's loss
    (equation 4 of arXiv:2402.03300).

    Args:
        logprobs: (...) log-probabilities of the sampled tokens under the new policy.
        old_logprobs: (...) log-probabilities under the policy that sampled them.

    Returns:
        (...) non-negative terms, in nats.
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
    """Computes the sequence-level reward: min-max-normalised judge score, EOS penalty and length bonus.

    The formula is that of arXiv:2507.11155, except that equal judge scores are normalised to 0.5 (the published
    implementation divides 0 by 0).

    Args:
        judged: (B,) judge score of each response: minus the judge's cross entropy against the image's label. That of a
            response without an answer (unfinished thinking) is ``low``.
        low: Scalar minimum of the scores over the global batch (all processes together).
        high: Scalar maximum of the scores over the global batch.
        stopped: (B,) True where the response has an answer and ended with the end token.
        lengths: (B,) number of tokens of each response, without reasoning; 0 without an answer.
        response_length: Maximum number of tokens of a response.
        no_eos_penalty: Added to the reward of a response that was cut off.
        length_bonus: Bonus of a response of ``response_length`` tokens; proportional to the length for shorter ones.

    Returns:
        (B,) rewards.
    """
    spread = high - low
    normalised = torch.where(spread > 0, (judged - low) / spread.clamp(min=torch.finfo(judged.dtype).tiny), 0.5)
    return normalised + no_eos_penalty * ~stopped + length_bonus * lengths / response_length


def constrained(gains: Tensor, costs: Tensor, multiplier: float) -> Tensor:
    r"""Combines gains and costs by a Lagrange multiplier, as the advantages in arXiv:2310.12773.

    .. math:: \frac{g - \lambda c}{1 + \lambda}

    Args:
        gains: Rewards, or their advantages.
        costs: Costs, or their advantages; of the same shape.
        multiplier: Lagrange multiplier, at least 0; 0 leaves the gains unchanged.

    Returns:
        The combination, of the same shape.
    """
    return (gains - multiplier * costs) / (1 + multiplier)


def token_rewards(
    sequence: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float, scale: float
) -> Tensor:
    """Computes the per-token reward: a KL penalty at every token, the sequence reward at the last one.

    The KL term is the k1 estimate log pi - log pi_ref, clamped to be at least 0 as in the published implementation.

    Args:
        sequence: (B,) sequence-level rewards, see :func:`sequence_rewards`.
        logprobs: (B, T) log-probabilities under the policy that sampled the tokens.
        reference: (B, T) log-probabilities under the reference model.
        mask: (B, T) True at response tokens, contiguous from the first one.
        kl_coef: KL coefficient, per nat.
        scale: Factor of all rewards.

    Returns:
        (B, T) rewards, 0 outside the mask.
    """
    rewards = -kl_coef * (logprobs - reference).clamp(min=0) * mask
    last = mask.sum(-1, keepdim=True) - 1
    return scale * rewards.scatter_add(-1, last, sequence[:, None])


def whiten(values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Shifts and scales values to mean 0 and variance 1 over the response tokens of all processes.

    Args:
        values: (B, T) for example advantages.
        mask: (B, T) True at response tokens.
        total: Sums a scalar over all processes.

    Returns:
        (B, T) whitened values, 0 outside the mask.
    """
    count = total(mask.sum())
    mean = total((values * mask).sum()) / count
    variance = total(((values - mean).square() * mask).sum()) / count
    return (values - mean) * (variance + 1e-8).rsqrt() * mask


def explained_variance(returns: Tensor, values: Tensor) -> Tensor:
    """Computes 1 - Var(returns - values) / Var(returns), the explained variance of a value function.

    Args:
        returns: (N,) returns of the response tokens.
        values: (N,) values predicted for them.

    Returns:
        Scalar: 1 for a perfect value function, 0 for a constant one; not finite where the returns are constant.
    """
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0)
