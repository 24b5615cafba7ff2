"""How answers are drawn: the settings, and noise that belongs to a record alone."""

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
    """How answers are drawn; the defaults are the published measurement's.

    Args:
        temperature: the logits are divided by it; 0 takes the most probable token (greedy).
        top_p: draws from the smallest set of tokens whose probabilities sum to at least this (arXiv:1904.09751).
        max_new_tokens: an answer that has not ended after so many tokens is cut.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        """Refuses values that draw nothing."""
        in_range("sampling", least=0, temperature=self.temperature)
        in_range("sampling", above=0, most=1, top_p=self.top_p)
        in_range("sampling", least=1, max_new_tokens=self.max_new_tokens)


class KeyedNoise:
    """Turns argmax into sampling: adds Gumbel noise drawn from (seed, record id), one draw a step.

    ``argmax(logits + Gumbel noise)`` is a draw from ``softmax(logits)``. Each record has its own generator: what is
    drawn for it depends neither on its neighbours nor on the batch, the order or the number of processes. The noise is
    drawn on the CPU, so that it doesn't depend on the device either.

    Args:
        seeds: one a row of the batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def select(self, rows: Sequence[int]) -> Self:
        """Goes on with some of the rows."""
        rest = type(self)([])
        rest.generators = [self.generators[row] for row in rows]
        return rest

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Adds the next step's noise to (B, V) scores."""
        uniform = torch.stack(
            [torch.rand(scores.shape[-1], generator=generator, dtype=torch.float64) for generator in self.generators]
        )
        gumbel = -torch.log(-torch.log(uniform.to(scores.device)))
        return scores + gumbel.float()


class Finite:
    """Notes which rows have had logits that are not finite, and lets them go on with others: no answer comes of them.

    It stands before all other processors, which would spread a NaN or hide it.
    """

    def __init__(self) -> None:
        self.bad: Tensor | None = None  # (B,), True where one has been seen

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Puts 0 in the place of all (B, V) scores of a row that holds NaN or plus infinity, or nothing else."""
        bad = ~torch.isfinite(scores.amax(-1))  # NaN is the largest; a model may forbid single tokens by minus infinity
        self.bad = bad if self.bad is None else self.bad | bad
        return scores.masked_fill(bad[:, None], 0)


class Suppress:
    """Makes tokens impossible.

    Args:
        token_ids: the tokens that an answer must not contain.
    """

    def __init__(self, token_ids: Tensor) -> None:
        self.token_ids = token_ids

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Sets their scores, in the last dimension, to minus infinity."""
        return scores.float().index_fill(-1, self.token_ids.to(scores.device), -torch.inf)


def processors(sampling: Sampling, suppressed: Tensor) -> LogitsProcessorList:
    """What turns (B, V) logits into the scores that are drawn from: suppressed tokens, temperature, top_p."""
    chain = LogitsProcessorList([Suppress(suppressed)])
    if sampling.temperature > 0:
        chain += [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)]
    return chain
