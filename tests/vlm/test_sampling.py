"""The choice of the next token: its distribution, top_p, and independence of the batch."""

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import TopPLogitsWarper

from safervlm.vlm import sampling as module
from safervlm.vlm.noise import gumbel, noise_key, token_bits
from safervlm.vlm.sampling import (
    COLDEST,
    RecordedSampling,
    Sampler,
    Sampling,
    Suppress,
    sample_from_all,
    sample_from_nucleus,
)

NOTHING = torch.tensor([], dtype=torch.int64)
DEVICE = torch.device("cpu")


def keys(count: int) -> list[int]:
    return [noise_key(7, f"r{number}") for number in range(count)]


def normal(rows: int, tokens: int, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, tokens, generator=torch.Generator().manual_seed(2)) * scale


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8), (1.7, 0.9)], ids=lambda value: str(value)
)
def test_tokens_have_the_distribution_of_the_settings(temperature: float, top_p: float) -> None:
    logits, rows = normal(1, 40, 1.5), 10_000
    suppressed = torch.tensor([3, 4])
    sampler = Sampler(Sampling(temperature, top_p), suppressed, keys(rows), DEVICE)
    first, second = (sampler.choose(logits.expand(rows, -1)) for _ in range(2))
    scores = logits.double().index_fill(1, suppressed, -torch.inf) / temperature
    expected = (TopPLogitsWarper(top_p)(NOTHING, scores) if top_p < 1 else scores).softmax(-1)[0]
    both = torch.bincount(torch.cat([first, second]), minlength=40)
    kept = expected > 0
    assert both[~kept].sum() == 0
    assert stats.chisquare(both[kept], expected[kept] / expected[kept].sum() * 2 * rows).pvalue > 0.01
    # Two steps are independent: the likely pairs, and the others together.
    pairs = torch.bincount(first * 40 + second, minlength=1600).double()
    counts = (expected[:, None] * expected).flatten() * rows
    likely = counts >= 5
    observed = [*pairs[likely].tolist(), float(pairs[~likely].sum())]
    wanted = [*counts[likely].tolist(), float(rows - counts[likely].sum())]
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    scaled = [value * sum(observed) / sum(wanted) for value in wanted]
    assert stats.chisquare(observed, scaled).pvalue > 0.01


def by_the_library(scores: Tensor, counters: Tensor, top_p: float) -> Tensor:
    """The same with a full sort and the noise of all tokens."""
    kept = TopPLogitsWarper(top_p)(NOTHING, scores) if top_p < 1 else scores
    return (kept + gumbel(token_bits(counters, torch.arange(scores.shape[1])))).argmax(-1)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("most", [2, 16, 1000, 5000])
def test_a_partial_sort_chooses_as_a_full_one(top_p: float, most: int) -> None:
    """The rows are sharp and flat, so that some are computed again with a longer sort."""
    scores = normal(60, 2000) * torch.linspace(0.1, 9, 60)[:, None]
    scores[:, :3] = -torch.inf
    counters = torch.tensor(keys(60))
    assert torch.equal(sample_from_nucleus(scores, counters, top_p, most), by_the_library(scores, counters, top_p))


def test_equally_probable_tokens_survive_together() -> None:
    scores = torch.tensor([3.0, *[0.0] * 20, -9.0]).expand(2000, -1)
    for most in (1, 4, 30):
        chosen = sample_from_nucleus(scores, torch.tensor(keys(2000)), 0.6, most)
        counts = torch.bincount(chosen, minlength=22)
        assert (counts[:21] > 0).all()
        assert counts[21] == 0


def test_noise_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, counters = normal(7, 300), torch.tensor(keys(7))
    for together in (1, 700, 10_000):
        monkeypatch.setattr(module, "TOGETHER", {True: together})
        assert torch.equal(sample_from_all(scores, counters), by_the_library(scores, counters, 1.0))


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_sampled_tokens_of_a_row_do_not_depend_on_other_rows(top_p: float) -> None:
    logits = normal(12, 400) * torch.linspace(0.1, 9, 12)[:, None]
    whole = Sampler(Sampling(top_p=top_p), NOTHING, keys(12), DEVICE)
    some = Sampler(Sampling(top_p=top_p), NOTHING, [keys(12)[row] for row in (8, 2, 5)], DEVICE)
    for _ in range(3):
        assert torch.equal(whole.choose(logits)[[8, 2, 5]], some.choose(logits[[8, 2, 5]]))
    some.select([2, 0])
    assert torch.equal(whole.choose(logits)[[5, 8]], some.choose(logits[[5, 8]]))


def test_single_token_with_all_probability_is_always_chosen() -> None:
    logits = torch.full((500, 100), -40.0)
    logits[:, 17] = 0
    for settings in (Sampling(top_p=0.5), Sampling(temperature=0)):
        assert set(Sampler(settings, NOTHING, keys(500), DEVICE).choose(logits).tolist()) == {17}


def test_rows_without_finite_logits_are_recorded() -> None:
    logits = normal(5, 30)
    logits[1, 4], logits[2, 5], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, :29] = -torch.inf
    sampler = Sampler(Sampling(), NOTHING, keys(5), DEVICE)
    first = sampler.choose(logits)
    assert sampler.bad.tolist() == [False, True, True, True, False]
    assert first[4] == 29
    sampler.select([0, 2])
    sampler.choose(logits[[0, 0]])
    assert sampler.bad.tolist() == [False, True]
    assert logits[1, 4].isnan()


class Operations(TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        (Sampling(temperature=0), set()),
        (Sampling(), {"topk", "bitwise_xor_"}),
        (Sampling(top_p=1.0), {"bitwise_xor_"}),
    ],
    ids=["greedy", "top_p", "all"],
)
def test_greedy_decoding_neither_sorts_nor_generates_noise(settings: Sampling, used: set[str]) -> None:
    sampler = Sampler(settings, NOTHING, keys(3), DEVICE)
    with Operations() as operations:
        sampler.choose(normal(3, 5000, 5.0))
    assert operations.names & {"sort", "topk", "bitwise_xor_"} == used


def test_logits_processor_keeps_only_the_chosen_token() -> None:
    logits = normal(6, 50)
    make: Callable[[], Sampler] = lambda: Sampler(Sampling(), torch.tensor([1]), keys(6), DEVICE)  # noqa: E731
    scores = make()(NOTHING, logits)
    assert torch.equal(scores.argmax(-1), make().choose(logits))
    assert (scores.isfinite().sum(-1) == 1).all()


def test_suppress_leaves_the_rest() -> None:
    scores = torch.arange(6.0).reshape(2, 3)
    expected = [[0, -torch.inf, 2], [3, -torch.inf, 5]]
    assert Suppress(torch.tensor([1]))(None, scores).tolist() == expected


@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-9])
def test_the_smallest_temperature_chooses_the_most_probable_token(top_p: float) -> None:
    logits = torch.tensor([[90.0, 100.0, 99.0, -100.0]])
    sampler = Sampler(RecordedSampling(COLDEST, top_p), NOTHING, [3], DEVICE)
    assert sampler.choose(logits).tolist() == [1]
    assert sampler.logprobs[0].tolist() == [0.0]


@pytest.mark.parametrize("values", [{"temperature": -1}, {"temperature": 1e-38}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_invalid_sampling_settings_are_rejected(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"sampling.{next(iter(values))}"):
        Sampling(**values)  # type: ignore[arg-type]
