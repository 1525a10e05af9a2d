"""Triton kernel that dequantizes a 4-bit weight with quantized scales at memory bandwidth.

bitsandbytes needs two kernels and a temporary for the scales; this is one kernel, and its output may be strided.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xtuner.kernels import reference
from xtuner.kernels.quantized import QuantizedWeight

_BLOCKS, _WARPS = 32, 4  # quantization blocks and warps per program; larger programs were slower on an H200


@triton.jit
def block_values(
    packed, table, absmax, absmax_table, absmax_scale, offset, factor, block, inside,
    NESTED: tl.constexpr, SCALED: tl.constexpr, COARSE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Values of quantization blocks, float32 (blocks, 2 HALF), divided by `factor` if SCALED."""
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        fine = tl.load(absmax_table + code)
        scale = fine * tl.load(absmax_scale + block // COARSE, mask=inside, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    if SCALED:
        scale = scale / tl.load(factor)
    byte = tl.arange(0, HALF)
    pair = tl.load(packed + block[:, None] * HALF + byte[None, :], mask=inside[:, None], other=0).to(tl.int32)
    high = tl.load(table + (pair >> 4)) * scale[:, None]
    low = tl.load(table + (pair & 15)) * scale[:, None]
    return tl.reshape(tl.join(high, low), (block.shape[0], 2 * HALF))


@triton.jit
def _dequantize(
    packed, table, absmax, absmax_table, absmax_scale, offset, factor, out, num_blocks, row_blocks, out_row,
    NESTED: tl.constexpr, SCALED: tl.constexpr, COARSE: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    values = block_values(
        packed, table, absmax, absmax_table, absmax_scale, offset, factor, block, inside, NESTED, SCALED, COARSE, HALF
    )
    start = (block // row_blocks) * out_row + (block % row_blocks) * (2 * HALF)
    column = tl.arange(0, 2 * HALF)
    target = out + start[:, None] + column[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=inside[:, None])


def has_partial_blocks(weight: QuantizedWeight) -> bool:
    """Whether blocks cross row ends or have an odd size; the kernels leave these to plain PyTorch."""
    return bool(weight.shape[1] % weight.block or weight.block & (weight.block - 1))


def arguments(weight: QuantizedWeight) -> tuple[Tensor, ...]:
    """A weight's tensors in the order of the kernels' parameters, with a placeholder for missing ones."""
    nested = (weight.absmax_table, weight.absmax_scale, weight.offset)
    return weight.packed, weight.table, weight.absmax, *(weight.table if t is None else t for t in nested)


def dequantize_into(out_NK: Tensor, weight: QuantizedWeight, scale: Tensor | None = None) -> None:
    """See `reference.dequantize_into`."""
    if has_partial_blocks(weight):
        reference.dequantize_into(out_NK, weight, scale)
        return
    blocks = weight.shape[0] * weight.shape[1] // weight.block
    _dequantize[(triton.cdiv(blocks, _BLOCKS),)](
        *arguments(weight), weight.table if scale is None else scale, out_NK, blocks, weight.shape[1] // weight.block,
        out_NK.stride(0), NESTED=weight.absmax_table is not None, SCALED=scale is not None,
        COARSE=weight.absmax_block, HALF=weight.block // 2, BLOCKS=_BLOCKS, num_warps=_WARPS,
    )  # fmt: skip
