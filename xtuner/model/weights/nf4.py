"""NF4 quantization of 16-bit weights on a CPU: bit-equal to bitsandbytes and about ten times faster.

bitsandbytes multiplies a value by the reciprocal of its block's maximum and compares the product with 15 thresholds.
For 16-bit values this can be inverted: the product is monotonic in the value, so for each of the 32,640 possible maxima
there are 15 smallest 16-bit numbers at which the code increases. They are computed once with the same products; the
code of a value is then the number of thresholds that it reaches, by comparing 16-bit integers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64  # values per scale in bitsandbytes' layers
_SMALLEST = 1e-38  # lower bound of a block's maximum in bitsandbytes
_MAGNITUDE = 0x7FFF  # magnitude bits of a 16-bit float


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes a weight to the codes and scales of `bitsandbytes.functional.quantize_4bit`.

    Args:
        weight: (out, in), float16 or bfloat16, contiguous, on the CPU, with a multiple of `BLOCK` elements.

    Returns:
        Codes, uint8 (out * in / 2,), two per byte, the first in the high bits; scales, float32 (out * in / BLOCK,).
        Non-finite scales mean that the weight is not finite and the codes are meaningless.
    """
    bits = weight.view(torch.int16).view(-1, BLOCK)
    largest = (bits & _MAGNITUDE).amax(1)
    limits = _limits(weight.dtype).index_select(0, largest.int())
    ordered = (bits >> 15).bitwise_and_(_MAGNITUDE).bitwise_xor_(bits)
    codes, reached = torch.zeros_like(ordered), torch.empty_like(ordered)
    for limit in limits.unbind(1):
        codes += torch.ge(ordered, limit[:, None], out=reached)
    pairs = codes.view(torch.int32).view(-1)  # the first of two is in the lower half
    packed = (pairs >> 16).add_(pairs, alpha=16)
    return packed.to(torch.uint8), largest.view(weight.dtype).float()


@lru_cache
def _limits(dtype: torch.dtype) -> Tensor:
    """Code thresholds, int16 (2^15, 15): for each bit pattern of a block's maximum the smallest numbers, ordered."""
    from bitsandbytes.functional import get_4bit_type

    values = get_4bit_type('nf4', device='cpu')
    bounds = (values[:-1] + values[1:]) / 2
    bits = torch.arange(2**15, dtype=torch.int32)
    inverse = (1.0 / bits.short().view(dtype).float().clamp(min=_SMALLEST))[:, None]
    # Bisection among the numbers in such a block, from -maximum to maximum; one above means that none reaches it.
    low = (-1 - bits)[:, None].repeat(1, len(bounds))
    high = (bits + 1).clamp(max=_MAGNITUDE)[:, None].repeat(1, len(bounds))
    for _ in range(17):
        middle = (low + high) >> 1
        above = _number(middle, dtype) * inverse > bounds
        high = torch.where(above, middle, high)
        low = torch.where(above | (low >= high), low, middle + 1)
    return high.short()


def _number(order: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of 16-bit floats by order, -0.0 before 0.0, in float32: 0 is 0.0, 1 the smallest positive, -1 is -0.0."""
    bits = order.short()
    return ((bits >> 15).bitwise_and_(_MAGNITUDE) ^ bits).view(dtype).float()
