"""Counter-based Gumbel noise: integer hashes of (seed, record id, sample number, step, token), equal on every device.

A token's random bits depend on nothing but these five, so that noise can be computed for some of the tokens, in any
batch. The hash is that of SplitMix64 (doi:10.1145/2714064.2660195): a counter that grows by a constant, and a mixing
function. Integers in PyTorch wrap around, so the bits are the same on a CPU and on a GPU.

Shapes: B rows, K tokens of a row.
"""

from torch import Tensor

from safervlm.hashing import seed_for

# Version of the noise, part of the settings of a run: a record has another response with another version. 1 was a
# generator of PyTorch per record.
NOISE = 2


def _signed(bits: int) -> int:
    """Returns the signed 64-bit integer with the same bits."""
    return bits - (1 << 64) if bits >> 63 else bits


STEP, FIRST, SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def noise_key(seed: int, record_id: str, sample: int = 0) -> int:
    """Returns the key of a response's noise.

    Args:
        seed: Seed of the sampling.
        record_id: Id of the question.
        sample: Number of the response, if a question has several.
    """
    return seed_for(seed, record_id, sample)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shifts to the right and fills with zeros; PyTorch's own shift copies the sign."""
    return bits.bitwise_right_shift(places).bitwise_and_((1 << (64 - places)) - 1)


def mix_(bits: Tensor) -> Tensor:
    """Mixes 64-bit integers in place, one to one: the output function of SplitMix64.

    Args:
        bits: Integers of type int64, of any shape.

    Returns:
        The argument.
    """
    bits.bitwise_xor_(_shifted(bits, 30)).mul_(FIRST)
    bits.bitwise_xor_(_shifted(bits, 27)).mul_(SECOND)
    return bits.bitwise_xor_(_shifted(bits, 31))


def token_bits(counters: Tensor, tokens: Tensor) -> Tensor:
    """Returns 64 random bits per token.

    Args:
        counters: (B,) counters of the rows: their keys plus ``STEP`` for each step, beginning with one.
        tokens: (B, K) or (K,) token ids.

    Returns:
        (B, K) integers of type int64.
    """
    return mix_(mix_(counters.clone())[:, None] + (tokens + 1) * STEP)


def gumbel(bits: Tensor) -> Tensor:
    """Converts random bits to standard Gumbel noise in float32, which is finite for all bits.

    The noise is ``-log(-log(1 - v))`` for a uniform v. The tokens that win have v near 0, where float32 resolves all
    63 bits. Rounding could make v 0 or 1, whose noise is infinite: hence the two bounds.

    Args:
        bits: Integers of type int64; overwritten.
    """
    uniform = bits.bitwise_right_shift_(1).bitwise_and_((1 << 63) - 1).clamp_(min=1).float()
    return uniform.mul_(2.0**-63).clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()
