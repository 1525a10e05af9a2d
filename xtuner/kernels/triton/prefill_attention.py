"""Triton kernels for prefill: residual add with norm, RoPE with cache write, attention over the KV cache.

cuDNN's attention is as fast but compiles a plan for each length, in 40 ms or more; flash attention takes twice the time
for a prompt of 2,000 tokens on a Hopper GPU, and neither can continue an existing cache without a mask.

Shape letters: T new tokens, L cache capacity, N heads, D head size.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtuner.kernels.triton.elementwise import warps_for


@triton.jit
def _add_norm(x, y, weight, out, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    acc = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    acc += tl.load(y + row + column, mask=inside, other=0.0).to(tl.float32)
    rounded = acc.to(x.dtype.element_ty)
    tl.store(x + row + column, rounded, mask=inside)
    value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, value * scale * factor, mask=inside)


@triton.jit(do_not_specialize=['start'])
def _rope_into_cache(
    qkv, cos, sin, keys, values, start, capacity, token_width, group_width,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (head < QUERIES + 2 * KEYS) & (column < HALF)
    source = qkv + token * token_width + group * group_width + head * (2 * HALF) + column
    x1 = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    rotated = head < QUERIES + KEYS
    c = tl.where(rotated, tl.load(cos + token * HALF + column, mask=column < HALF, other=1.0).to(tl.float32), 1.0)
    s = tl.where(rotated, tl.load(sin + token * HALF + column, mask=column < HALF, other=0.0).to(tl.float32), 0.0)
    low, high = x1 * c - x2 * s, x2 * c + x1 * s
    query = mask & (head < QUERIES)
    tl.store(source, low, mask=query)
    tl.store(source + HALF, high, mask=query)
    key = mask & (head >= QUERIES) & rotated
    slot = ((group * KEYS + head - QUERIES) * capacity + start + token) * (2 * HALF) + column
    tl.store(keys + slot, low, mask=key)
    tl.store(keys + slot + HALF, high, mask=key)
    value = mask & (head >= QUERIES + KEYS)
    slot = ((group * KEYS + head - QUERIES - KEYS) * capacity + start + token) * (2 * HALF) + column
    tl.store(values + slot, low, mask=value)
    tl.store(values + slot + HALF, high, mask=value)


@triton.jit(do_not_specialize=['length', 'start'])  # avoids a recompilation for each kind of number
def _attend(
    query, keys, values, out, length, start, capacity, token_width, group_width, out_width, scale,
    QUERIES: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    # Later rows attend to more tokens; starting with them balances the load.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    row, column = first + tl.arange(0, ROWS), tl.arange(0, SIZE)
    offset = (row.to(tl.int64) * token_width)[:, None] + column[None, :]
    query_head = query + (head // QUERIES) * group_width + (head % QUERIES) * SIZE
    q = tl.load(query_head + offset, mask=(row < length)[:, None], other=0.0)
    row_max = tl.full((ROWS,), float('-inf'), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, SIZE), tl.float32)
    base = (head // SHARED).to(tl.int64) * capacity * SIZE
    unmasked_end = (start + first + 1) // TOKENS * TOKENS
    row_max, row_sum, acc = _attend_to(
        q, keys + base, values + base, row_max, row_sum, acc, row, 0, unmasked_end, start, scale, False, SIZE, TOKENS
    )
    end = start + tl.minimum(first + ROWS, length)
    row_max, row_sum, acc = _attend_to(
        q, keys + base, values + base, row_max, row_sum, acc, row, unmasked_end, end, start, scale, True, SIZE, TOKENS
    )
    offset = (row.to(tl.int64) * out_width)[:, None] + (head * SIZE + column)[None, :]
    tl.store(out + offset, acc / row_sum[:, None], mask=(row < length)[:, None])


@triton.jit
def _attend_to(
    q, keys, values, row_max, row_sum, acc, row, begin, end, start, scale,
    MASKED: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Attends to the cached tokens from `begin` to `end` with online softmax; `scale` is for base-2 exponentials."""
    column = tl.arange(0, SIZE)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        offset = token[:, None] * SIZE + column[None, :]
        if MASKED:
            k = tl.load(keys + offset, mask=(token < end)[:, None], other=0.0)
            v = tl.load(values + offset, mask=(token < end)[:, None], other=0.0)
        else:
            k = tl.load(keys + offset)
            v = tl.load(values + offset)
        score = tl.dot(q, tl.trans(k)) * scale
        if MASKED:
            score = tl.where(token[None, :] <= (start + row)[:, None], score, float('-inf'))
        new_max = tl.maximum(row_max, tl.max(score, axis=1))
        rescale = tl.exp2(row_max - new_max)
        probs = tl.exp2(score - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(probs, axis=1)
        acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None])
        row_max = new_max
    return row_max, row_sum, acc


def supports(dtype: torch.dtype, size: int) -> bool:
    """Whether `attend` supports heads of this size and dtype, which tensor cores must be able to multiply."""
    return dtype in (torch.bfloat16, torch.float16) and size in (64, 128)


def add_norm(x_TH: Tensor, y_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Adds `y_TH` to `x_TH` in place; returns the RMSNorm of the sum. All tensors are contiguous."""
    rows, size = x_TH.shape
    out = torch.empty_like(x_TH)
    block = triton.next_power_of_2(size)
    _add_norm[(rows,)](x_TH, y_TH, weight_H, out, size, eps, BLOCK=block, num_warps=warps_for(block))
    return out


def rope_into_cache(
    qkv: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, start: int, *, queries: int
) -> None:
    """Applies RoPE to new tokens' queries in place, and writes rotated keys and values to the cache.

    Args:
        qkv: (T, groups, heads of a group, D), rows contiguous: queries, keys, values.
        angles: Cosines and sines of the new tokens' positions, (T, D / 2) each, contiguous.
        keys: Key cache, (N, L, D), contiguous.
        values: Value cache, same shape.
        start: Position of the first new token.
        queries: Query heads per group.
    """
    tokens, groups, heads, size = qkv.shape
    _rope_into_cache[(tokens, groups)](
        qkv, *angles, keys, values, start, keys.shape[1], qkv.stride(0), qkv.stride(1), QUERIES=queries,
        KEYS=(heads - queries) // 2, HEADS=triton.next_power_of_2(heads), HALF=size // 2,
        BLOCK=triton.next_power_of_2(size // 2), num_warps=4 if heads * size < 4096 else 8,
    )  # fmt: skip


def attend(qkv: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, *, queries: int) -> Tensor:
    """Causal attention of new tokens over the cache, which already contains them.

    Uses online softmax (Dao et al., FlashAttention-2, 2023, algorithm 1).

    Args:
        qkv: The output of `rope_into_cache`.
        keys: Key cache, (N, L, D), contiguous, with a dtype and size that `supports` accepts.
        values: Value cache, same shape.
        start: Position of the first new token.
        scale: Factor of the scores.
        queries: Query heads per group.

    Returns:
        (T, query heads * D).
    """
    tokens, groups, _, size = qkv.shape
    out = torch.empty(tokens, groups * queries * size, dtype=qkv.dtype, device=qkv.device)
    rows, tokens_each, warps, stages = _tile(qkv.device)
    _attend[(triton.cdiv(tokens, rows), groups * queries)](
        qkv, keys, values, out, tokens, start, keys.shape[1], qkv.stride(0), qkv.stride(1), out.stride(0),
        scale / math.log(2), QUERIES=queries, SHARED=groups * queries // len(keys), SIZE=size, ROWS=rows,
        TOKENS=tokens_each, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _tile(device: torch.device) -> tuple[int, int, int, int]:
    """Rows and cached tokens per step, warps and stages: the fastest of 24 on an H100; fits an Ampere GPU's memory."""
    if device.type != 'cuda':
        return 16, 16, 4, 1  # interpreter: several steps even in small tests
    return 64, 64, 4, 3 if torch.cuda.get_device_capability(device)[0] == 9 else 2
