"""Random numbers that are functions of a seed and a counter, without a generator's state.

Philox 4x32-10 (Salmon et al., SC 2011) in integer tensor arithmetic, and normal numbers by Box-Muller. A number depends on its
counter alone: not on how many others are drawn, in which order, or by which rank. The logarithm, sine and cosine are series of
sums, products and quotients in float64, for IEEE 754 says every bit of those: the numbers are the same on CPUs and GPUs and in
every version of torch, which does not hold for its own `log` and `cos`. Nothing here may be compiled, for a compiler may
contract a product and a sum into one rounding.

The counter's words are (block of a row, row, third, fourth). Their users share one key, so that no two of them may have the same
fourth word: the streams are numbered here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

SAMPLE_NOISE, SAMPLE_LABELS, STEP, POSTERIOR = range(4)
"""Streams: noise and labels of generated samples; the draws of a training step; posterior samples of training data."""
STREAM_BITS = 16
"""The stream is the upper half of the counter's fourth word, the number of a draw the lower one."""
CACHED_BLOCKS = 1 << 15
"""Blocks computed at once on a CPU, so that their words stay in its cache."""

Words = tuple[Tensor, Tensor, Tensor, Tensor]
Third = int | Tensor


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox 4x32-10: counter of four and key of two 32-bit words -> four 32-bit words, in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # A product of two 32-bit words that leaves int64 wraps around, which keeps all of its 64 bits.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_and_(MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product0 >> 32).bitwise_and_(MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product1.bitwise_and_(MASK), product0.bitwise_and_(MASK)
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def fourth_word(stream: int, draw: int = 0) -> int:
    """The counter's fourth word. Raises ValueError for a draw of more than 16 bits."""
    if not 0 <= draw < 1 << STREAM_BITS:
        raise ValueError(f"draw {draw} is outside 0 to {(1 << STREAM_BITS) - 1}")
    return draw | stream << STREAM_BITS


def random_words(seed: int, rows: Tensor, blocks: int, third: Third, fourth: int) -> Words:
    """(n,) int64 rows -> four (n, blocks) int64 of 32-bit words, on the rows' device; all 64 bits of the seed count.

    `third` is one word for all rows, or (n,) of them.
    """
    shape = (len(rows), blocks)
    block = torch.arange(blocks, device=rows.device).expand(shape)
    row = (rows & MASK)[:, None].expand(shape)
    if not isinstance(third, Tensor):
        third = torch.full_like(rows, third)
    seed &= (1 << 64) - 1
    counter = block, row, (third & MASK)[:, None].expand(shape), torch.full_like(block, fourth)
    return philox(counter, (seed & MASK, seed >> 32))


def uniform_rows(
    seed: int, rows: Tensor, third: Third, fourth: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(n,) int64 -> (n,) in [0, 1), multiples of 2^-24 in float32, of 2^-53 in float64."""
    first, second, *_ = (word[:, 0] for word in random_words(seed, rows, 1, third, fourth))
    if dtype == torch.float64:
        return ((first >> 5) * 2**26 + (second >> 6)).double() * 2.0**-53
    return (first >> 8).float() * 2.0**-24


def integer_rows(seed: int, rows: Tensor, high: int, third: Third, fourth: int) -> Tensor:
    """(n,) int64 -> (n,) int64 from 0 to below `high`, each with probability 1 / high up to 2^-32."""
    return (random_words(seed, rows, 1, third, fourth)[0][:, 0] * high) >> 32


def normal_rows(seed: int, rows: Tensor, shape: tuple[int, ...], third: Third, fourth: int) -> Tensor:
    """(n,) int64 -> (n, *shape) float32, standard normal; row i is a function of (seed, rows[i], third, fourth)."""
    size = math.prod(shape)
    blocks = -(-size // 4)
    at_once = max(1, CACHED_BLOCKS // max(1, blocks)) if rows.device.type == "cpu" else len(rows)
    numbers = torch.empty(len(rows), size, device=rows.device)
    for start in range(0, len(rows), max(1, at_once)):
        part = slice(start, start + at_once)
        words = random_words(
            seed, rows[part], blocks, third[part] if isinstance(third, Tensor) else third, fourth
        )
        pairs = [*normal_pair(*words[:2]), *normal_pair(*words[2:])]
        numbers[part] = torch.stack(pairs, dim=2).flatten(1)[:, :size]
    return numbers.reshape(len(rows), *shape)


def normal_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two int64 tensors of 32-bit words -> two float32 ones of independent normal numbers (Box-Muller)."""
    radius = _minus_log(first).mul_(2).sqrt_()
    cosine, sine = _circle(second)
    return cosine.mul_(radius).float(), sine.mul_(radius).float()


_ONE = 0x3FF0000000000000
_SQRT_HALF = 0x3FE6A09E667F3BCD
"""Bits of 1 and of the square root of 1/2 in float64."""
_FRACTION = (1 << 52) - 1
_LOG_TERMS = tuple(1 / (2 * k + 1) for k in range(8))
"""ln((1 + s) / (1 - s)) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...); |s| <= 0.172 leaves 4e-14 after eight terms."""
_SINE_TERMS = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(7))
_COSINE_TERMS = tuple((-1) ** k / math.factorial(2 * k) for k in range(8))
"""Taylor series on [-pi/4, pi/4], where the next term is below 3e-14."""


def _series(z: Tensor, terms: tuple[float, ...]) -> Tensor:
    """Horner's rule, a product and a sum at a time."""
    total = torch.full_like(z, terms[-1])
    for term in reversed(terms[:-1]):
        total.mul_(z).add_(term)
    return total


def _minus_log(word: Tensor) -> Tensor:
    """-ln((w + 1/2) / 2^32) in float64 for a 32-bit word w: from 1.2e-10 to 22.9."""
    bits = (word * 2 + 1).double().view(torch.int64) + (_ONE - _SQRT_HALF)
    # 2 w + 1 = 2^exponent mantissa, with the mantissa from the root of 1/2 to that of 2.
    exponent = (bits >> 52) - 1023
    mantissa = bits.bitwise_and_(_FRACTION).add_(_SQRT_HALF).view(torch.float64)
    s = (mantissa - 1).div_(mantissa + 1)
    log = _series(s * s, _LOG_TERMS).mul_(s).mul_(2)
    return (33 - exponent).double().mul_(math.log(2)).sub_(log)


def _circle(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine in float64 of 2 pi w / 2^32 for a 32-bit word w."""
    shifted = word + (1 << 29)
    quarter = (shifted >> 30) & 3
    angle = ((shifted & ((1 << 30) - 1)) - (1 << 29)).double().mul_(2 * math.pi / 2**32)
    square = angle * angle
    sine, cosine = _series(square, _SINE_TERMS).mul_(angle), _series(square, _COSINE_TERMS)
    swapped = (quarter & 1).bool()
    # Quarters 0 to 3: (cos, sin) = (c, s), (-s, c), (-c, -s), (s, -c).
    cosine_sign = 1 - ((quarter + 1) & 2).double()
    sine_sign = 1 - (quarter & 2).double()
    return (
        torch.where(swapped, sine, cosine).mul_(cosine_sign),
        torch.where(swapped, cosine, sine).mul_(sine_sign),
    )
