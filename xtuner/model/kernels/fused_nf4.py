"""A Triton kernel that turns a 4-bit weight with quantised scales into floats, at the memory's speed.

bitsandbytes takes two kernels and a temporary for the scales; this is one, and it writes into rows of a wider buffer.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtuner.model.kernels import plain
from xtuner.model.kernels.quantized import QuantizedWeight

# Quantisation blocks a program, warps: which is fastest depends on the GPU, so the first large weight decides.
_CHOICES = ((32, 4), (64, 4), (128, 4), (128, 8), (256, 8))
_CHOSEN: dict[int, tuple[int, int]] = {}
_LARGE = 2**20


@triton.jit
def _dequantize(
    packed, table, absmax, absmax_table, absmax_scale, offset, out, num_blocks, row_blocks, out_row,
    NESTED: tl.constexpr, COARSE: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        fine = tl.load(absmax_table + code)
        scale = fine * tl.load(absmax_scale + block // COARSE, mask=inside, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    byte = tl.arange(0, HALF)
    pair = tl.load(packed + block[:, None] * HALF + byte[None, :], mask=inside[:, None], other=0).to(tl.int32)
    high = tl.load(table + (pair >> 4)) * scale[:, None]
    low = tl.load(table + (pair & 15)) * scale[:, None]
    values = tl.reshape(tl.join(high, low), (BLOCKS, 2 * HALF)).to(out.dtype.element_ty)
    start = (block // row_blocks) * out_row + (block % row_blocks) * (2 * HALF)
    column = tl.arange(0, 2 * HALF)
    tl.store(out + start[:, None] + column[None, :], values, mask=inside[:, None])


def dequantize_into(out_NK: Tensor, weight: QuantizedWeight) -> None:
    """See `plain.dequantize_into`, which also takes the rare weight whose blocks straddle its rows."""
    if weight.shape[1] % weight.block or weight.block & (weight.block - 1):
        plain.dequantize_into(out_NK, weight)
        return
    blocks = weight.shape[0] * weight.shape[1] // weight.block
    if blocks * weight.block < _LARGE or not out_NK.is_cuda or torch.cuda.is_current_stream_capturing():
        _launch(out_NK, weight, blocks, _CHOSEN.get(out_NK.get_device(), _CHOICES[0]))
        return
    device = out_NK.get_device()
    if device not in _CHOSEN:
        _CHOSEN[device] = min(_CHOICES, key=lambda choice: _time(out_NK, weight, blocks, choice))
    _launch(out_NK, weight, blocks, _CHOSEN[device])


def _launch(out_NK: Tensor, weight: QuantizedWeight, blocks: int, choice: tuple[int, int]) -> None:
    nested = weight.absmax_table is not None
    _dequantize[(triton.cdiv(blocks, choice[0]),)](
        weight.packed, weight.table, weight.absmax, weight.absmax_table if nested else weight.table,
        weight.absmax_scale if nested else weight.table, weight.offset if nested else weight.table, out_NK,
        blocks, weight.shape[1] // weight.block, out_NK.stride(0), NESTED=nested, COARSE=weight.absmax_block,
        HALF=weight.block // 2, BLOCKS=choice[0], num_warps=choice[1],
    )  # fmt: skip


def _time(out_NK: Tensor, weight: QuantizedWeight, blocks: int, choice: tuple[int, int]) -> float:
    """Milliseconds of ten launches after two."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for number in range(12):
        if number == 2:
            start.record()
        _launch(out_NK, weight, blocks, choice)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
