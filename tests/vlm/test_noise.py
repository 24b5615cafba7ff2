"""The noise of sampling: an integer hash with golden values, and noise of the right distribution without infinities."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from safervlm.hashing import seed_for
from safervlm.vlm.noise import STEP, gumbel, mix_, noise_key, token_bits

WORD = (1 << 64) - 1
TOKENS = torch.arange(16384)


def counters(step: int, keys: Tensor) -> Tensor:
    return keys + torch.tensor(step + 1) * STEP


def keys(count: int) -> Tensor:
    return torch.tensor([noise_key(0, f"UnsafeConcepts/images/{n // 3}.png/alignment/{n % 3}") for n in range(count)])


def uniform(step: int, keys: Tensor, tokens: Tensor = TOKENS) -> Tensor:
    return ((token_bits(counters(step, keys), tokens) >> 12) & ((1 << 52) - 1)).double() * 2.0**-52


def test_noise_bits_equal_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    outputs = mix_(1234567 + torch.arange(1, 5) * STEP)
    assert [value & WORD for value in outputs.tolist()] == published


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_golden_bits(device: str) -> None:
    """These values define version 2 of the noise: if they change, NOISE has to."""
    names = [(0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0)]
    rows = torch.tensor([noise_key(*name) for name in names]).to(device)
    tokens = torch.tensor([0, 1, 2, 151_000]).to(device)
    assert token_bits(counters(3, rows), tokens).tolist() == [
        [2600005355349220812, -674589541644858127, -4512421547289308874, 1051312062942005971],
        [-1120721985577479558, -8159144855264343673, 8218321723685679036, -8029533693912553631],
        [5666193417385117760, 4058230253535794526, -3576540412173349137, -8812797659348452690],
        [3760337428683463527, -1980966254558974352, -467144568803132851, -1427700496381003491],
    ]


def test_the_key_has_seed_record_and_sample() -> None:
    assert noise_key(0, "a") == noise_key(0, "a", 0) == seed_for(0, "a", 0)
    assert len({noise_key(0, "a"), noise_key(0, "a", 1), noise_key(1, "a"), noise_key(0, "b")}) == 4


def test_bits_of_selected_tokens_and_rows_equal_those_of_the_full_table() -> None:
    rows = keys(5)
    every = token_bits(rows, TOKENS)
    assert torch.equal(token_bits(rows[[3, 1]], TOKENS[[9, 2, 700]]), every[[3, 1]][:, [9, 2, 700]])
    of_each = torch.tensor([[5, 1], [2, 8], [0, 0], [4, 3], [16383, 7]])
    assert torch.equal(token_bits(rows, of_each), every.gather(1, of_each))
    assert torch.equal(rows, keys(5))


def test_noise_is_finite_and_ordered_for_all_bits() -> None:
    """The extreme bits, and those that float32 rounds to the ends of the interval."""
    top = (1 << 63) - 1
    ordered = [0, 1, 2, 1 << 20, 1 << 62, top, -(1 << 63), -(1 << 40), -2, -1]  # as unsigned numbers
    noise = gumbel(torch.tensor(ordered))
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert (noise.diff() <= 0).all()
    assert noise[0] == pytest.approx(63 * math.log(2), rel=1e-6)
    assert noise[4] == pytest.approx(-math.log(-math.log(1 - 0.25)), rel=1e-6)
    assert noise[-1] == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)


def p_of_counts(values: Tensor, bins: int) -> float:
    return float(stats.chisquare(torch.bincount((values * bins).long().flatten(), minlength=bins).numpy()).pvalue)


def p_of_pairs(one: Tensor, other: Tensor) -> float:
    """The p-value for independence: 128 x 128 equally probable bins."""
    return p_of_counts(((one * 128).floor() * 128 + (other * 128).floor()) / 128**2 + 1e-6, 128**2)


def test_bits_are_uniform_and_independent_of_each_other() -> None:
    values = torch.stack([uniform(step, keys(16)) for step in range(4)])  # (step, record, token): 1 million
    in_a_row = uniform(0, torch.arange(64))  # keys that differ by little
    found = {
        "bins": p_of_counts(values, 1 << 12),
        "low bits": p_of_counts(values * 2**40 % 1, 256),
        "tokens": p_of_pairs(values[:, :, :-1], values[:, :, 1:]),
        "tokens 4 apart": p_of_pairs(values[:, :, :-4], values[:, :, 4:]),
        "steps": p_of_pairs(values[:-1], values[1:]),
        "records": p_of_pairs(values[:, :-1], values[:, 1:]),
        "keys in a row": p_of_pairs(in_a_row[:-1], in_a_row[1:]),
    }
    assert min(found.values()) > 0.01, found
    correlations = torch.corrcoef(values.flatten(0, 1))[torch.triu_indices(64, 64, 1).unbind()] * len(TOKENS) ** 0.5
    assert correlations.abs().max() < 4.5
    assert correlations.var() == pytest.approx(1, abs=0.1)


def test_a_bit_of_the_key_changes_half_the_bits() -> None:
    base = keys(64)
    places = torch.arange(64)
    for place in range(63):
        changed = token_bits(base ^ (1 << place), TOKENS[:64]) ^ token_bits(base, TOKENS[:64])
        assert ((changed[..., None] >> places) & 1).double().mean() == pytest.approx(0.5, abs=0.01)


def test_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel(token_bits(counters(0, keys(64)), TOKENS)).double()
    assert stats.kstest(noise.flatten()[:200_000].numpy(), "gumbel_r").pvalue > 0.01
    for bound in (6, 8, 10):  # the tokens that win
        expected = noise.numel() * -math.expm1(-math.exp(-bound))
        assert (noise > bound).sum().item() == pytest.approx(expected, abs=3 * expected**0.5)
