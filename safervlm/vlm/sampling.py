"""Sampling settings, and the choice of the next token by batch-invariant sampling.

Shapes: B rows, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from safervlm.ranges import in_range
from safervlm.vlm.noise import STEP, gumbel, token_bits

NUCLEUS = 1024  # largest logits of a row that are sorted first; usually, far fewer tokens remain after top_p
MORE = 16  # factor for the rows in which more tokens remain
# Logits for which noise is computed together: on a CPU so few that they stay in its cache, else so few that the
# memory for them doesn't matter.
TOGETHER = {True: 2**17, False: 2**24}
COLDEST = 1e-6  # smallest temperature besides 0; logits divided by a much smaller one would be infinite


@dataclass(frozen=True)
class Sampling:
    """Decoding settings; the defaults are those of the published measurement (arXiv:2507.11155).

    Args:
        temperature: Divisor of the logits, at least :data:`COLDEST`; or 0, which selects the most probable token
            (greedy decoding).
        top_p: Nucleus sampling: samples from the smallest set of tokens whose probabilities sum to at least this value
            (arXiv:1904.09751).
        max_new_tokens: Maximum number of tokens of a response; longer ones are truncated.

    Raises:
        ArgumentError: A value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    max_new_tokens: int = 512
    logprobs: ClassVar[bool] = False  # whether responses contain the log-probabilities of their tokens

    def __post_init__(self) -> None:
        """Rejects values out of range."""
        in_range("sampling", least=COLDEST if self.temperature > 0 else 0, temperature=self.temperature)
        in_range("sampling", above=0, most=1, top_p=self.top_p)
        in_range("sampling", least=1, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True)
class RecordedSampling(Sampling):
    """Decoding settings of responses that contain the log-probabilities of their tokens, ``token_logprobs``."""

    logprobs: ClassVar[bool] = True


class Suppress:
    """Logits processor that excludes tokens.

    Args:
        token_ids: Tokens that a response must not contain.
    """

    def __init__(self, token_ids: Tensor) -> None:
        self.token_ids = token_ids

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Sets the scores of the tokens, in the last dimension, to minus infinity."""
        return scores.float().index_fill(-1, self.token_ids.to(scores.device), -torch.inf)


class Sampler:
    """Chooses the next token of each row from its logits, for every model family.

    Non-finite logits are recorded first: any other operation would spread a NaN or hide it. Then come suppressed
    tokens, temperature and top_p. ``argmax(logits + Gumbel noise)`` is a sample from ``softmax(logits)``. The noise of
    a response depends only on its key, the step and the token, so a response doesn't depend on the other rows, the
    batch size, the order, the number of processes or the device (up to rounding of the logits).

    A sampler is also a logits processor for the ``generate`` of transformers, to be used with ``do_sample=False``.

    Args:
        sampling: Decoding settings.
        suppressed: Tokens that a response must not contain.
        keys: Key of the noise of each row (:func:`safervlm.vlm.noise.noise_key`).
        device: Device of the logits.

    Attributes:
        bad: (B,) True for rows whose logits were not finite in a step so far.
        logprobs: For each step so far, (B,) log-probabilities of the chosen tokens among all tokens that are not
            suppressed, at the temperature; before top_p. Empty unless ``sampling.logprobs``.
    """

    def __init__(self, sampling: Sampling, suppressed: Tensor, keys: Sequence[int], device: torch.device) -> None:
        self.sampling, self.suppressed = sampling, suppressed.to(device)
        self.counters = torch.tensor(keys, dtype=torch.int64, device=device)
        self.bad = torch.zeros(len(keys), dtype=torch.bool, device=device)
        self.logprobs: list[Tensor] = []
        self.steps = 0

    def select(self, rows: Sequence[int]) -> None:
        """Keeps some of the rows, in the given order.

        Args:
            rows: Indices of the rows to keep.
        """
        self.counters, self.bad = self.counters[rows], self.bad[rows]

    def choose(self, logits: Tensor) -> Tensor:
        """Returns the next token of each row, and advances by a step.

        Args:
            logits: (B, V) logits of the model.
        """
        self.steps += 1
        self.counters = self.counters + STEP
        scores, bad = prepared_scores(logits, self.suppressed, self.sampling.temperature)
        self.bad = self.bad | bad
        if self.sampling.temperature == 0:
            chosen = scores.argmax(-1)
        elif self.sampling.top_p < 1:
            chosen = sample_from_nucleus(scores, self.counters, self.sampling.top_p)
        else:
            chosen = sample_from_all(scores, self.counters)
        if self.sampling.logprobs:
            self.logprobs.append(logprobs_of(scores, chosen))
        return chosen

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns (B, V) scores whose only finite entries are those of the chosen tokens."""
        return torch.full_like(scores, -torch.inf).scatter_(1, self.choose(scores)[:, None], 0)


def prepared_scores(logits: Tensor, suppressed: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns the scores from which tokens are chosen, and which rows had logits that are not finite.

    Args:
        logits: (B, V) logits of the model.
        suppressed: Tokens that a response must not contain.
        temperature: See :class:`Sampling`; 0 leaves the scores unchanged.
    """
    bad = ~torch.isfinite(logits.amax(-1))  # amax propagates NaN; single tokens may be minus infinity
    scores = logits.float().masked_fill(bad[:, None], 0).index_fill_(-1, suppressed, -torch.inf)
    return scores if temperature in (0, 1) else scores.div_(temperature), bad


def logprobs_of(scores: Tensor, chosen: Tensor) -> Tensor:
    """Returns the (B,) log-probabilities of tokens.

    Args:
        scores: (B, V) scores, see :func:`prepared_scores`.
        chosen: (B,) tokens.
    """
    return scores.gather(-1, chosen[:, None])[:, 0] - scores.logsumexp(-1)


def sample_from_all(scores: Tensor, counters: Tensor) -> Tensor:
    """Samples a token of each row from all tokens.

    Args:
        scores: (B, V) logits.
        counters: (B,) counters of the noise.

    Returns:
        (B,) token ids.
    """
    tokens = torch.arange(scores.shape[-1], device=scores.device)
    rows = max(1, TOGETHER[scores.device.type == "cpu"] // scores.shape[-1])
    chosen = [
        (some + gumbel(token_bits(those, tokens))).argmax(-1)
        for some, those in zip(scores.split(rows), counters.split(rows), strict=True)
    ]
    return torch.cat(chosen)


def sample_from_nucleus(scores: Tensor, counters: Tensor, top_p: float, most: int = NUCLEUS) -> Tensor:
    """Samples a token of each row from its most probable tokens, whose probabilities sum to at least ``top_p``.

    Only the ``most`` largest logits are sorted. Rows that need more are computed again with more logits, and each
    row separately, so that no row depends on the others.

    Args:
        scores: (B, V) logits.
        counters: (B,) counters of the noise.
        top_p: See :class:`Sampling`; below 1.
        most: Number of logits of a row to sort.

    Returns:
        (B,) token ids.
    """
    chosen, undecided = sample_from_largest(scores, counters, top_p, most)
    if most < scores.shape[-1]:
        rows = undecided.nonzero()[:, 0]
        if len(rows):
            chosen[rows] = sample_from_nucleus(scores[rows], counters[rows], top_p, MORE * most)
    return chosen


def sample_from_largest(scores: Tensor, counters: Tensor, top_p: float, most: int) -> tuple[Tensor, Tensor]:
    """Samples a token of each row from its most probable tokens, if ``most`` of them suffice.

    Tokens as probable as the last of them are included, too, so the set doesn't depend on how a sort orders equal
    logits, which are frequent in bfloat16.

    Args:
        scores: (B, V) logits.
        counters: (B,) counters of the noise.
        top_p: See :class:`Sampling`; below 1.
        most: Number of logits of a row to sort.

    Returns:
        (B,) token ids, and (B,) True for the rows whose set may be larger than ``most``.
    """
    values, tokens = scores.topk(min(most, scores.shape[-1]))
    probabilities = (values - scores.logsumexp(-1, keepdim=True)).exp()
    before = probabilities.cumsum(-1) - probabilities
    least = values.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
    noisy = (values + gumbel(token_bits(counters, tokens))).masked_fill_(values < least, -torch.inf)
    chosen = tokens.gather(-1, noisy.argmax(-1, keepdim=True))[:, 0]
    if most >= scores.shape[-1]:
        return chosen, torch.zeros_like(chosen, dtype=torch.bool)
    return chosen, values[:, -1] >= least[:, 0]


@dataclass(frozen=True)
class Choice:
    """The settings that determine the choice of a token from logits.

    Attributes:
        sampling: Decoding settings.
        suppressed: Tokens that a response must not contain.
        ends: Tokens that end a response.
    """

    sampling: Sampling
    suppressed: Tensor
    ends: Tensor

    def tokens(self, logits: Tensor, counters: Tensor, levels: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Chooses a token of each row.

        Args:
            logits: (B, V) logits.
            counters: (B,) counters of the noise.
            levels: How many times more logits than :data:`NUCLEUS` are sorted, in all rows. None sorts more logits only
                in the rows that need them, which synchronises with the CPU, and leaves no token undecided.

        Returns:
            (B,) tokens; (B,) whether the logits were not finite; (B,) whether the token is undecided, because more
            logits have to be sorted; (B,) log-probabilities of the tokens, 0 unless the sampling records them.
        """
        scores, wrong = prepared_scores(logits, self.suppressed, self.sampling.temperature)
        chosen, undecided = self._chosen(scores, counters, levels)
        recorded = self.sampling.logprobs
        logprobs = logprobs_of(scores, chosen) if recorded else torch.zeros_like(wrong, dtype=scores.dtype)
        return chosen, wrong, undecided, logprobs

    def _chosen(self, scores: Tensor, counters: Tensor, levels: int | None) -> tuple[Tensor, Tensor]:
        """Returns the tokens, and which of them are undecided."""
        decided = torch.zeros_like(counters, dtype=torch.bool)
        if self.sampling.temperature == 0:
            return scores.argmax(-1), decided
        if self.sampling.top_p == 1:
            return sample_from_all(scores, counters), decided
        if levels is None:
            return sample_from_nucleus(scores, counters, self.sampling.top_p), decided
        most = NUCLEUS
        chosen, undecided = sample_from_largest(scores, counters, self.sampling.top_p, most)
        for _ in range(levels):
            most *= MORE
            again, still = sample_from_largest(scores, counters, self.sampling.top_p, most)
            chosen, undecided = torch.where(undecided, again, chosen), undecided & still
        return chosen, undecided
