"""NF4 of 16-bit weights on a CPU: bitsandbytes' values bit for bit, some ten times faster.

bitsandbytes multiplies a value by the reciprocal of its block's largest, and looks the product up among 15 limits. For
16-bit values that can be turned round: the product grows with the value, so for each of the 32,640 possible largest
values there are 15 least 16-bit numbers at which the code rises. They are found once, by the same products; then a code
is the count of those that a value has reached, in comparisons of 16-bit integers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64  # values that share a scale in bitsandbytes' layers
_SMALLEST = 1e-38  # the least of a block's largest value, as bitsandbytes takes it
_MAGNITUDE = 0x7FFF  # of the bits of a 16-bit float


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight's codes and scales as `bitsandbytes.functional.quantize_4bit` gives them.

    Args:
        weight: (out, in), float16 or bfloat16, contiguous, on the CPU, its elements a multiple of `BLOCK`.

    Returns:
        Codes uint8 (out * in / 2,), two a byte, the first in the upper half; scales float32 (out * in / BLOCK,). Scales
        that are not finite say that the weight is not, and that the codes mean nothing.
    """
    bits = weight.view(torch.int16).view(-1, BLOCK)
    largest = (bits & _MAGNITUDE).amax(1)
    limits = _limits(weight.dtype).index_select(0, largest.int())
    ordered = (bits >> 15).bitwise_and_(_MAGNITUDE).bitwise_xor_(bits)
    codes, reached = torch.zeros_like(ordered), torch.empty_like(ordered)
    for limit in limits.unbind(1):
        codes += torch.ge(ordered, limit[:, None], out=reached)
    pairs = codes.view(torch.int32).view(-1)  # the first of two lies in the lower half
    packed = (pairs >> 16).add_(pairs, alpha=16)
    return packed.to(torch.uint8), largest.view(weight.dtype).float()


@lru_cache
def _limits(dtype: torch.dtype) -> Tensor:
    """Where codes begin: int16 (2^15, 15), for the bits of a block's largest value the least numbers, in `_order`."""
    from bitsandbytes.functional import get_4bit_type

    values = get_4bit_type('nf4', device='cpu')
    bounds = (values[:-1] + values[1:]) / 2
    bits = torch.arange(2**15, dtype=torch.int32)
    inverse = (1.0 / bits.short().view(dtype).float().clamp(min=_SMALLEST))[:, None]
    # Bisection among the numbers that such a block can hold, from -largest to largest; one above: none reaches it.
    low = (-1 - bits)[:, None].repeat(1, len(bounds))
    high = (bits + 1).clamp(max=_MAGNITUDE)[:, None].repeat(1, len(bounds))
    for _ in range(17):
        middle = (low + high) >> 1
        above = _number(middle, dtype) * inverse > bounds
        high = torch.where(above, middle, high)
        low = torch.where(above | (low >= high), low, middle + 1)
    return high.short()


def _number(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The 16-bit floats in their order, -0.0 before 0.0: 0 is 0.0, 1 the least positive one, -1 is -0.0; as float32."""
    bits = order.short()
    return ((bits >> 15).bitwise_and_(_MAGNITUDE) ^ bits).view(dtype).float()
