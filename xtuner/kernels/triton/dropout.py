"""Triton kernels for LoRA under dropout: the mask is generated inside each product and never stored.

The mask is a hash of the entry's index and a seed (see `reference.dropout_keep`), so the backward pass regenerates it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtuner.kernels import reference


@triton.jit
def _keep(row, column, size, seed, threshold):
    """Whether entries are kept: the hash of `reference._hash_`, over (rows, columns)."""
    lower = seed.to(tl.uint32)
    seed2 = (lower * 0x9E3779B1) ^ (lower >> 15)
    x = (row[:, None] * size + column[None, :]).to(tl.uint32) ^ lower
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x + seed2
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return x >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=['seed', 'threshold'])
def _project(
    x, a, out, rows, size, rank, x_row, a_row, out_row, seed, threshold, factor,
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    r = tl.arange(0, BR)
    seed_value = tl.load(seed)
    acc = tl.zeros((BT, BR), dtype=tl.float32)
    for start in range(0, size, BK):
        column = start + tl.arange(0, BK)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        value = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
        value = tl.where(_keep(row, column, size, seed_value, threshold), value, 0.0)
        a_ptr = a + r[None, :] * a_row + column[:, None]
        weight = tl.load(a_ptr, mask=(r < rank)[None, :] & (column < size)[:, None], other=0.0)
        acc = tl.dot(value, weight, acc, input_precision='ieee')
    target = out + row[:, None] * out_row + r[None, :]
    tl.store(target, acc * factor, mask=(row < rows)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=['seed', 'threshold'])
def _weight_grad(
    dxa, x, out, rows, size, rank, dxa_row, x_row, rows_each, seed, threshold, factor,
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    r = tl.arange(0, BR)
    seed_value = tl.load(seed)
    acc = tl.zeros((BR, BK), dtype=tl.float32)
    for start in range(0, rows_each, BT):
        row = (split * rows_each + start + tl.arange(0, BT)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        value = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
        value = tl.where(_keep(row, column, size, seed_value, threshold), value, 0.0)
        dxa_ptr = dxa + row[None, :] * dxa_row + r[:, None]
        gradient = tl.load(dxa_ptr, mask=(r < rank)[:, None] & (row < rows)[None, :], other=0.0)
        acc = tl.dot(gradient, value, acc, input_precision='ieee')
    target = out + (split * rank + r[:, None]) * size + column[None, :]
    tl.store(target, acc * factor, mask=(r < rank)[:, None] & (column < size)[None, :])


@triton.jit(do_not_specialize=['seed', 'threshold'])
def _input_grad(
    dx, dxa, a, rows, size, rank, dx_row, dxa_row, a_row, seed, threshold, factor,
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BK + tl.arange(0, BK)
    row = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    r = tl.arange(0, BR)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    dxa_ptr = dxa + row[:, None] * dxa_row + r[None, :]
    gradient = tl.load(dxa_ptr, mask=(row < rows)[:, None] & (r < rank)[None, :], other=0.0)
    a_ptr = a + r[:, None] * a_row + column[None, :]
    weight = tl.load(a_ptr, mask=(r < rank)[:, None] & (column < size)[None, :], other=0.0)
    seed_value = tl.load(seed)
    product = tl.dot(gradient, weight, input_precision='ieee') * factor
    target = dx + row[:, None] * dx_row + column[None, :]
    before = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    masked = tl.where(_keep(row, column, size, seed_value, threshold), product, 0.0)
    tl.store(target, before + masked, mask=inside)


def dropout_project(x_TK: Tensor, a_rK: Tensor, p: float, seed: Tensor, out_Tr: Tensor) -> None:
    """See `reference.dropout_project`."""
    (rows, size), rank = x_TK.shape, a_rK.shape[0]
    tile = 64 if rows >= 8192 else 32
    _project[(triton.cdiv(rows, tile),)](
        x_TK, a_rK, out_Tr, rows, size, rank, x_TK.stride(0), a_rK.stride(0), out_Tr.stride(0),
        seed, reference.drop_threshold(p), 1 / (1 - p),
        BT=tile, BK=128, BR=_rank_block(rank), num_warps=4, num_stages=3,
    )  # fmt: skip


def dropout_project_weight_grad(dxa_Tr: Tensor, x_TK: Tensor, p: float, seed: Tensor) -> Tensor:
    """See `reference.dropout_project_weight_grad`; tokens are split over programs and the parts summed in order."""
    (rows, size), rank = x_TK.shape, dxa_Tr.shape[1]
    splits = min(8, triton.cdiv(rows, 256))
    rows_each = triton.cdiv(triton.cdiv(rows, splits), 64) * 64
    parts = torch.empty((splits, rank, size), dtype=torch.float32, device=x_TK.device)
    _weight_grad[(triton.cdiv(size, 64), splits)](
        dxa_Tr, x_TK, parts, rows, size, rank, dxa_Tr.stride(0), x_TK.stride(0), rows_each,
        seed, reference.drop_threshold(p), 1 / (1 - p), BT=64, BK=64, BR=_rank_block(rank), num_warps=4, num_stages=3,
    )  # fmt: skip
    return parts.sum(0) if splits > 1 else parts[0]


def dropout_project_input_grad_(dx_TK: Tensor, dxa_Tr: Tensor, a_rK: Tensor, p: float, seed: Tensor) -> None:
    """See `reference.dropout_project_input_grad_`."""
    (rows, size), rank = dx_TK.shape, a_rK.shape[0]
    _input_grad[(triton.cdiv(size, 128), triton.cdiv(rows, 64))](
        dx_TK, dxa_Tr, a_rK, rows, size, rank, dx_TK.stride(0), dxa_Tr.stride(0), a_rK.stride(0),
        seed, reference.drop_threshold(p), 1 / (1 - p), BT=64, BK=128, BR=_rank_block(rank), num_warps=4, num_stages=2,
    )  # fmt: skip


def _rank_block(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))
