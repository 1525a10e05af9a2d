"""A Triton kernel that turns a 4-bit weight with quantised scales into floats, at the memory's speed.

bitsandbytes takes two kernels and a temporary for the scales; this is one, and it writes into rows of a wider buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtuner.model.kernels import plain
from xtuner.model.kernels.quantized import QuantizedWeight

_BLOCKS = 32  # quantisation blocks a program


@triton.jit
def _dequantize(
    packed, table, absmax, absmax_table, absmax_scale, offset, out, num_blocks, row_blocks, out_row,
    NESTED: tl.constexpr, COARSE: tl.constexpr, WORDS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        fine = tl.load(absmax_table + code)
        scale = fine * tl.load(absmax_scale + block // COARSE, mask=inside, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    # A thread takes 8 values, 4 bytes in and 16 bytes out; the joins put value 4 b2 + 2 b1 + b0 at place (b2, b1, b0).
    at = tl.arange(0, WORDS)
    word = tl.load(packed + block[:, None] * WORDS + at[None, :], mask=inside[:, None], other=0)
    v0 = tl.load(table + ((word >> 4) & 15)) * scale[:, None]
    v1 = tl.load(table + (word & 15)) * scale[:, None]
    v2 = tl.load(table + ((word >> 12) & 15)) * scale[:, None]
    v3 = tl.load(table + ((word >> 8) & 15)) * scale[:, None]
    v4 = tl.load(table + ((word >> 20) & 15)) * scale[:, None]
    v5 = tl.load(table + ((word >> 16) & 15)) * scale[:, None]
    v6 = tl.load(table + ((word >> 28) & 15)) * scale[:, None]
    v7 = tl.load(table + ((word >> 24) & 15)) * scale[:, None]
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    values = tl.reshape(tl.join(even, odd), (BLOCKS, 8 * WORDS)).to(out.dtype.element_ty)
    start = (block // row_blocks) * out_row + (block % row_blocks) * (8 * WORDS)
    column = tl.arange(0, 8 * WORDS)
    tl.store(out + start[:, None] + column[None, :], values, mask=inside[:, None])


def dequantize_into(out_NK: Tensor, weight: QuantizedWeight) -> None:
    """See `plain.dequantize_into`, which also takes the rare weight whose blocks straddle its rows."""
    if weight.shape[1] % weight.block or weight.block & (weight.block - 1) or weight.packed.data_ptr() % 4:
        plain.dequantize_into(out_NK, weight)
        return
    nested = weight.absmax_table is not None
    blocks = weight.shape[0] * weight.shape[1] // weight.block
    _dequantize[(triton.cdiv(blocks, _BLOCKS),)](
        weight.packed.view(torch.int32), weight.table, weight.absmax, weight.absmax_table if nested else weight.table,
        weight.absmax_scale if nested else weight.table, weight.offset if nested else weight.table, out_NK,
        blocks, weight.shape[1] // weight.block, out_NK.stride(0), NESTED=nested, COARSE=weight.absmax_block,
        WORDS=weight.block // 8, BLOCKS=_BLOCKS, num_warps=4,
    )  # fmt: skip
