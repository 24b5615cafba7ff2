"""Choosing a token against a chain of logits processors with a full sort."""

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from comparisons.timing import Row, say
from safervlm.vlm.sampling import Sampler, Sampling, Suppress

SUPPRESSED = torch.tensor([0, 1])  # tokens that a response must not contain


def zipf_logits(rows: int, vocabulary: int, exponent: float) -> Tensor:
    """Returns (rows, vocabulary) logits by Zipf's law, each row in its own order.

    Args:
        rows: number of rows.
        vocabulary: number of tokens.
        exponent: the exponent of a token's rank. With 1.5, about 60 tokens survive top_p .9; with 1.15, about 8,000.
    """
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(rows)])
    return -exponent * (1.0 + ranks).log()


def chain_with_sort(top_p: float, generators: Sequence[torch.Generator]) -> Callable[[Tensor], Tensor]:
    """Returns the former way to choose tokens: a full sort, and a generator per row.

    Args:
        top_p: see :class:`Sampling`.
        generators: the generator of each row.
    """
    warpers = (TemperatureLogitsWarper(1.0), TopPLogitsWarper(top_p))

    def choose(logits: Tensor) -> Tensor:
        bad = ~torch.isfinite(logits.amax(-1))
        scores = Suppress(SUPPRESSED)(None, logits.masked_fill(bad[:, None], 0))
        for warper in warpers:
            scores = warper(None, scores)
        size = scores.shape[-1]
        uniform = torch.stack([torch.rand(size, generator=each, dtype=torch.float64) for each in generators])
        return (scores - torch.log(-torch.log(uniform)).float()).argmax(-1)

    return choose


def benchmark_sampling(repeats: int, rows: int = 64, vocabulary: int = 152_064) -> list[Row]:
    """Compares :class:`safervlm.vlm.sampling.Sampler` with the former chain of logits processors.

    Args:
        repeats: number of measured repetitions.
        rows: number of rows of a batch.
        vocabulary: number of tokens.

    Raises:
        SystemExit: a chosen token doesn't survive top_p.
    """
    table = []
    for title, exponent, top_p, target in (
        ("top_p .9", 1.5, 0.9, 4.0),
        ("top_p .9, flat distributions", 1.15, 0.9, None),
        ("top_p 1", 1.5, 1.0, 1.8),
    ):
        logits = zipf_logits(rows, vocabulary, exponent)
        scores = Suppress(SUPPRESSED)(None, logits)
        kept = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
        sides = {
            "theirs": chain_with_sort(top_p, [torch.Generator().manual_seed(row) for row in range(rows)]),
            "ours": Sampler(Sampling(top_p=top_p), SUPPRESSED, list(range(rows)), logits.device).choose,
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(repeats + 1):
            for name, choose in sides.items():
                start = time.process_time()
                tokens = choose(logits)
                if repeat:
                    seconds[name].append(time.process_time() - start)
                if not kept.gather(1, tokens[:, None]).isfinite().all():
                    sys.exit(f"{title}: a token doesn't survive: the comparison is void")
        say(f"  {title}: {int(kept.isfinite().sum(-1).float().mean())} tokens survive")
        name = f"a token of {rows} rows of {vocabulary:,}, {title} : a full sort, a generator per row"
        table.append(Row(name, seconds["theirs"], seconds["ours"], target))
    return table
