"""Triton kernels over rows of activations: RMSNorm, RoPE, SwiGLU; see `reference` for their definitions.

Each makes a single pass over its inputs and computes in float32, so it runs at memory bandwidth.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtuner.kernels.reference import empty_with_spare


@triton.jit
def _rms_norm(x, weight, out, rstd, size, x_row, out_row, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column, value * scale * factor, mask=inside)
    tl.store(rstd + row, scale)


@triton.jit
def _rms_norm_backward(
    dh, x, rstd, weight, residual, dx, size, dh_row, x_row, residual_row, dx_row,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    scale = tl.load(rstd + row)
    normed = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32) * scale
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.load(dh + row * dh_row + column, mask=inside, other=0.0).to(tl.float32) * factor
    gradient = scale * (scaled - normed * (tl.sum(scaled * normed, axis=0) / size))
    if HAS_RESIDUAL:
        gradient += tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * dx_row + column, gradient, mask=inside)


@triton.jit
def _rotate(
    x, cos, sin, out, heads, x_token, x_group, x_head, out_token, out_group, out_head, sign,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    inside = (head < heads)[:, None] & (column < HALF)[None, :]
    c = tl.load(cos + token * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :] * sign
    outer, inner = (head // GROUP)[:, None], (head % GROUP)[:, None]
    source = x + token * x_token + outer * x_group + inner * x_head + column[None, :]
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = out + token * out_token + outer * out_group + inner * out_head + column[None, :]
    tl.store(target, x1 * c - x2 * s, mask=inside)
    tl.store(target + HALF, x2 * c + x1 * s, mask=inside)


@triton.jit
def _swiglu(gate_up, out, size, gate_up_row, out_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * gate_up_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_row + size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _swiglu_backward(dact, gate_up, size, dact_row, gate_up_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    at_act = dact + row * dact_row + column
    at_gate = gate_up + row * gate_up_row + column
    gradient = tl.load(at_act, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at_gate + size, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(at_gate, gradient * up * (sigmoid + silu * (1 - sigmoid)), mask=inside)
    tl.store(at_gate + size, gradient * silu, mask=inside)
    tl.store(at_act, silu * up, mask=inside)


@triton.jit
def _copy_rows(x, out, size, x_row, out_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    tl.store(out + row * out_row + column, tl.load(x + row * x_row + column, mask=inside), mask=inside)


def copy_rows(x_TK: Tensor, out_TK: Tensor) -> None:
    """See `reference.copy_rows`; PyTorch's own strided copy reaches a third of the memory bandwidth."""
    rows, size = x_TK.shape
    _copy_rows[(rows, triton.cdiv(size, 4096))](
        x_TK, out_TK, size, x_TK.stride(0), out_TK.stride(0), BLOCK=4096, num_warps=8
    )


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, out_TH: Tensor) -> Tensor:
    """See `reference.rms_norm`."""
    rows, size = x_TH.shape
    rstd = torch.empty(rows, dtype=torch.float32, device=x_TH.device)
    block = triton.next_power_of_2(size)
    _rms_norm[(rows,)](
        x_TH, weight_H, out_TH, rstd, size, x_TH.stride(0), out_TH.stride(0), eps, BLOCK=block,
        num_warps=warps_for(block),
    )  # fmt: skip
    return rstd


def rms_norm_backward(
    dh_TH: Tensor, x_TH: Tensor, rstd_T: Tensor, weight_H: Tensor, residual_TH: Tensor | None, *, spare: int = 0
) -> Tensor:
    """See `reference.rms_norm_backward`."""
    rows, size = x_TH.shape
    dx = empty_with_spare(x_TH, spare)
    block = triton.next_power_of_2(size)
    residual = dx if residual_TH is None else residual_TH
    _rms_norm_backward[(rows,)](
        dh_TH, x_TH, rstd_T, weight_H, residual, dx, size, dh_TH.stride(0), x_TH.stride(0), residual.stride(0),
        dx.stride(0), HAS_RESIDUAL=residual_TH is not None, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return dx


def rotate(x_TAD: Tensor, cos_TD: Tensor, sin_TD: Tensor, out_TAD: Tensor, *, inverse: bool) -> None:
    """See `reference.rotate`."""
    x_TKGD, out_TKGD = (x if x.dim() == 4 else x.unsqueeze(1) for x in (x_TAD, out_TAD))
    tokens, groups, group, size = x_TKGD.shape
    heads, half = groups * group, size // 2
    heads_each = min(16, triton.next_power_of_2(heads))
    _rotate[(tokens, triton.cdiv(heads, heads_each))](
        x_TAD, cos_TD, sin_TD, out_TAD, heads, *x_TKGD.stride()[:3], *out_TKGD.stride()[:3],
        -1.0 if inverse else 1.0, GROUP=group, HEADS=heads_each, HALF=half, BLOCK=triton.next_power_of_2(half),
        num_warps=4,
    )  # fmt: skip


def swiglu(gate_up: Tensor, out_TI: Tensor) -> None:
    """See `reference.swiglu`."""
    rows, size = out_TI.shape
    _swiglu[(rows, triton.cdiv(size, 2048))](
        gate_up, out_TI, size, gate_up.stride(0), out_TI.stride(0), BLOCK=2048, num_warps=8
    )


def swiglu_backward_(dact_TI: Tensor, gate_up: Tensor) -> None:
    """See `reference.swiglu_backward_`."""
    rows, size = dact_TI.shape
    _swiglu_backward[(rows, triton.cdiv(size, 2048))](
        dact_TI, gate_up, size, dact_TI.stride(0), gate_up.stride(0), BLOCK=2048, num_warps=8
    )


def warps_for(block: int) -> int:
    """Number of warps for a program that holds one row of so many entries."""
    return min(max(block // 512, 1), 16)
