"""Sampling settings and per-record, batch-invariant Gumbel noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from safervlm.ranges import in_range


@dataclass(frozen=True)
class Sampling:
    """Decoding settings; the defaults are those of the published measurement (arXiv:2507.11155).

    Args:
        temperature: Divisor of the logits; 0 selects the most probable token (greedy decoding).
        top_p: Nucleus sampling: samples from the smallest set of tokens whose probabilities sum to at least this value
            (arXiv:1904.09751).
        max_new_tokens: Maximum number of tokens of a response; longer ones are truncated.

    Raises:
        ArgumentError: A value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        """Rejects values out of range."""
        in_range("sampling", least=0, temperature=self.temperature)
        in_range("sampling", above=0, most=1, top_p=self.top_p)
        in_range("sampling", least=1, max_new_tokens=self.max_new_tokens)


class KeyedNoise:
    """Logits processor that turns argmax into sampling, by adding Gumbel noise keyed by (seed, record id, step).

    ``argmax(logits + Gumbel noise)`` is a sample from ``softmax(logits)``. Each record has its own generator, so its
    noise doesn't depend on the other records, the batch, the order or the number of processes. The noise is generated
    on the CPU, so it doesn't depend on the device either.

    Args:
        seeds: One seed per row of the batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def select(self, rows: Sequence[int]) -> Self:
        """Returns the noise of some of the rows; the generators, with their states, are shared.

        Args:
            rows: Indices of the rows to keep.
        """
        rest = type(self)([])
        rest.generators = [self.generators[row] for row in rows]
        return rest

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Adds the noise of the next step to (B, V) scores."""
        uniform = torch.stack(
            [torch.rand(scores.shape[-1], generator=generator, dtype=torch.float64) for generator in self.generators]
        )
        gumbel = -torch.log(-torch.log(uniform.to(scores.device)))
        return scores + gumbel.float()


class Finite:
    """Logits processor that records which rows had non-finite logits, and replaces these logits.

    It must come before all other processors, which would spread a NaN or hide it. Recorded rows are reported as
    unanswered.
    """

    def __init__(self) -> None:
        self.bad: Tensor | None = None  # (B,) True for rows with non-finite logits so far

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Sets all (B, V) scores of a row to 0 if it has NaN or plus infinity, or only minus infinity."""
        bad = ~torch.isfinite(scores.amax(-1))  # amax propagates NaN; single tokens may be minus infinity
        self.bad = bad if self.bad is None else self.bad | bad
        return scores.masked_fill(bad[:, None], 0)


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


def processors(sampling: Sampling, suppressed: Tensor) -> LogitsProcessorList:
    """Returns the logits processors before sampling: suppression, then temperature and top_p unless greedy.

    Args:
        sampling: Decoding settings.
        suppressed: Tokens that a response must not contain.
    """
    chain = LogitsProcessorList([Suppress(suppressed)])
    if sampling.temperature > 0:
        chain += [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)]
    return chain
