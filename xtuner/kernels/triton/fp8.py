"""Triton kernels for FP8 products (e4m3): quantize activations by row, and convert 4-bit weights to FP8, transposed.

The products themselves are cuBLAS's, which on Hopper requires both matrices to be contiguous along the inner dimension;
the backward pass therefore reads the transposed weight.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtuner.kernels import reference
from xtuner.kernels.quantized import QuantizedWeight
from xtuner.kernels.reference import FP8_MAX, FP8_TINY
from xtuner.kernels.triton.nf4 import arguments, block_values, has_partial_blocks


@triton.jit
def _quantize_rows(
    x, tail, out, scales, size, rank, x_row, tail_row, most, tiny,
    HAS_TAIL: tl.constexpr, BLOCK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(value), axis=0)
    width = size
    if HAS_TAIL:
        width = size + rank
        r = tl.arange(0, BR)
        more = tl.load(tail + row * tail_row + r, mask=r < rank, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.max(tl.abs(more), axis=0))
    scale = tl.maximum(peak / most, tiny)
    tl.store(scales + row, scale)
    start = out + row * width
    tl.store(start + column, (value / scale).to(out.dtype.element_ty), mask=inside)
    if HAS_TAIL:
        tl.store(start + size + r, (more / scale).to(out.dtype.element_ty), mask=r < rank)


def quantize_rows(x_TK: Tensor, tail_TR: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_rows`; one read and one write."""
    (rows, size), rank = x_TK.shape, 0 if tail_TR is None else tail_TR.shape[1]
    out = torch.empty(rows, size + rank, dtype=torch.float8_e4m3fn, device=x_TK.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x_TK.device)
    tail = x_TK if tail_TR is None else tail_TR
    block = triton.next_power_of_2(size)
    _quantize_rows[(rows,)](
        x_TK, tail, out, scales, size, rank, x_TK.stride(0), tail.stride(0), FP8_MAX, FP8_TINY,
        HAS_TAIL=rank > 0, BLOCK=block, BR=max(16, triton.next_power_of_2(rank)),
        num_warps=max(1, min(16, block // 1024)),
    )  # fmt: skip
    return out, scales


@triton.jit
def _dequantize_transposed(
    packed, table, absmax, absmax_table, absmax_scale, offset, factor, out, rows, row_blocks, out_row,
    NESTED: tl.constexpr, COARSE: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = row < rows
    block = row * row_blocks + tl.program_id(1)
    values = block_values(
        packed, table, absmax, absmax_table, absmax_scale, offset, factor, block, inside, NESTED, True, COARSE, HALF
    )
    column = tl.program_id(1) * (2 * HALF) + tl.arange(0, 2 * HALF)
    target = out + column[:, None].to(tl.int64) * out_row + row[None, :]
    tl.store(target, tl.trans(values.to(out.dtype.element_ty)), mask=inside[None, :])


def dequantize_transposed_into(out_KN: Tensor, weight: QuantizedWeight, scale: Tensor) -> None:
    """See `reference.dequantize_transposed_into`."""
    if has_partial_blocks(weight):
        reference.dequantize_transposed_into(out_KN, weight, scale)
        return
    rows, row_blocks = weight.shape[0], weight.shape[1] // weight.block
    _dequantize_transposed[(triton.cdiv(rows, 128), row_blocks)](
        *arguments(weight), scale, out_KN, rows, row_blocks, out_KN.stride(0), NESTED=weight.absmax_table is not None,
        COARSE=weight.absmax_block, HALF=weight.block // 2, BN=128, num_warps=4,
    )  # fmt: skip


def fp8_product(
    x_TK: Tensor, scale_T1: Tensor, weight_NK: Tensor, scale: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See `reference.fp8_product`; uses cuBLAS with fast accumulation (22 bits on Hopper) if the device has FP8."""
    if not x_TK.is_cuda:
        return reference.fp8_product(x_TK, scale_T1, weight_NK, scale, bias_N, dtype)
    scales = scale.expand(1, weight_NK.shape[0]).contiguous()
    fused_bias = None if dtype == torch.float32 else bias_N  # cuBLAS adds biases only to half-precision results
    out = torch._scaled_mm(x_TK, weight_NK.t(), scale_T1, scales, bias=fused_bias, out_dtype=dtype, use_fast_accum=True)
    return out if bias_N is None or fused_bias is not None else out.add_(bias_N)
