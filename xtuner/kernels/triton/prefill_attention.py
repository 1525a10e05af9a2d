"""Triton kernels for a prompt beside its products: sum and norm, rotation into the cache, attention over the cache.

cuDNN's attention is as fast, but plans anew for each length, 40 ms or more; flash attention's takes twice the time
for a prompt of 2,000 tokens on a Hopper GPU, and neither goes on from what the cache already holds without a mask.

Letters of shapes: T new tokens, L the cache's room, N heads, D a head's size.
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
    total = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(y + row + column, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(x.dtype.element_ty)
    tl.store(x + row + column, rounded, mask=inside)
    value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, value * scale * factor, mask=inside)


@triton.jit(do_not_specialize=['start'])
def _turn_into_cache(
    qkv, cos, sin, keys, values, start, capacity, token_width, group_width,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    there = (head < QUERIES + 2 * KEYS) & (column < HALF)
    source = qkv + token * token_width + group * group_width + head * (2 * HALF) + column
    first = tl.load(source, mask=there, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=there, other=0.0).to(tl.float32)
    turns = head < QUERIES + KEYS
    c = tl.where(turns, tl.load(cos + token * HALF + column, mask=column < HALF, other=1.0).to(tl.float32), 1.0)
    s = tl.where(turns, tl.load(sin + token * HALF + column, mask=column < HALF, other=0.0).to(tl.float32), 0.0)
    low, high = first * c - second * s, second * c + first * s
    query = there & (head < QUERIES)
    tl.store(source, low, mask=query)
    tl.store(source + HALF, high, mask=query)
    key = there & (head >= QUERIES) & turns
    slot = ((group * KEYS + head - QUERIES) * capacity + start + token) * (2 * HALF) + column
    tl.store(keys + slot, low, mask=key)
    tl.store(keys + slot + HALF, high, mask=key)
    value = there & (head >= QUERIES + KEYS)
    slot = ((group * KEYS + head - QUERIES - KEYS) * capacity + start + token) * (2 * HALF) + column
    tl.store(values + slot, low, mask=value)
    tl.store(values + slot + HALF, high, mask=value)


@triton.jit(do_not_specialize=['length', 'start'])  # else each kind of number is compiled anew
def _attend(
    query, keys, values, out, length, start, capacity, token_width, group_width, out_width, scale,
    QUERIES: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    # Later rows see more; begun first, they do not end alone.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    row, column = first + tl.arange(0, ROWS), tl.arange(0, SIZE)
    place = (row.to(tl.int64) * token_width)[:, None] + column[None, :]
    mine = query + (head // QUERIES) * group_width + (head % QUERIES) * SIZE
    q = tl.load(mine + place, mask=(row < length)[:, None], other=0.0)
    most = tl.full((ROWS,), float('-inf'), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, SIZE), tl.float32)
    base = (head // SHARED).to(tl.int64) * capacity * SIZE
    seen_by_all = (start + first + 1) // TOKENS * TOKENS
    most, mass, total = _attend_to(
        q, keys + base, values + base, most, mass, total, row, 0, seen_by_all, start, scale, False, SIZE, TOKENS
    )
    end = start + tl.minimum(first + ROWS, length)
    most, mass, total = _attend_to(
        q, keys + base, values + base, most, mass, total, row, seen_by_all, end, start, scale, True, SIZE, TOKENS
    )
    place = (row.to(tl.int64) * out_width)[:, None] + (head * SIZE + column)[None, :]
    tl.store(out + place, total / mass[:, None], mask=(row < length)[:, None])


@triton.jit
def _attend_to(
    q, keys, values, most, mass, total, row, begin, end, start, scale,
    MASKED: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Adds the tokens of the cache from `begin` to `end`; `scale` is for powers of two."""
    column = tl.arange(0, SIZE)
    for at in range(begin, end, TOKENS):
        token = at + tl.arange(0, TOKENS)
        place = token[:, None] * SIZE + column[None, :]
        if MASKED:
            k = tl.load(keys + place, mask=(token < end)[:, None], other=0.0)
            v = tl.load(values + place, mask=(token < end)[:, None], other=0.0)
        else:
            k = tl.load(keys + place)
            v = tl.load(values + place)
        score = tl.dot(q, tl.trans(k)) * scale
        if MASKED:
            score = tl.where(token[None, :] <= (start + row)[:, None], score, float('-inf'))
        now = tl.maximum(most, tl.max(score, axis=1))
        shrink = tl.exp2(most - now)
        share = tl.exp2(score - now[:, None])
        mass = mass * shrink + tl.sum(share, axis=1)
        total = tl.dot(share.to(v.dtype), v, total * shrink[:, None])
        most = now
    return most, mass, total


def takes(dtype: torch.dtype, size: int) -> bool:
    """Whether `attend` is for heads of a size in a dtype: what tensor cores multiply."""
    return dtype in (torch.bfloat16, torch.float16) and size in (64, 128)


def add_norm(x_TH: Tensor, y_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Adds `y_TH` to `x_TH` in place; returns the sum's RMS norm times the weight. All contiguous."""
    rows, size = x_TH.shape
    out = torch.empty_like(x_TH)
    block = triton.next_power_of_2(size)
    _add_norm[(rows,)](x_TH, y_TH, weight_H, out, size, eps, BLOCK=block, num_warps=warps_for(block))
    return out


def turn_into_cache(
    qkv: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, start: int, *, queries: int
) -> None:
    """Rotates new tokens' queries where they are; writes rotated keys, and values, to their places in the cache.

    Args:
        qkv: (T, groups, heads of a group, D), rows contiguous: queries, keys, values.
        angles: Cosines and sines of the new tokens' positions, (T, D / 2) each, contiguous.
        keys: (N, L, D), contiguous.
        values: Likewise.
        start: Position of the first new token.
        queries: Query heads of a group.
    """
    tokens, groups, heads, size = qkv.shape
    _turn_into_cache[(tokens, groups)](
        qkv, *angles, keys, values, start, keys.shape[1], qkv.stride(0), qkv.stride(1), QUERIES=queries,
        KEYS=(heads - queries) // 2, HEADS=triton.next_power_of_2(heads), HALF=size // 2,
        BLOCK=triton.next_power_of_2(size // 2), num_warps=4 if heads * size < 4096 else 8,
    )  # fmt: skip


def attend(qkv: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, *, queries: int) -> Tensor:
    """Causal attention of new tokens over the cache, which holds them already.

    The softmax is taken as it goes (Dao et al., FlashAttention-2, 2023, algorithm 1).

    Args:
        qkv: As `turn_into_cache` leaves it.
        keys: (N, L, D), contiguous, of a dtype and size that it `takes`.
        values: Likewise.
        start: Position of the first new token.
        scale: Of the scores.
        queries: Query heads of a group.

    Returns:
        (T, query heads * D).
    """
    tokens, groups, _, size = qkv.shape
    out = torch.empty(tokens, groups * queries * size, dtype=qkv.dtype, device=qkv.device)
    rows, seen, warps, stages = _tile(qkv.device)
    _attend[(triton.cdiv(tokens, rows), groups * queries)](
        qkv, keys, values, out, tokens, start, keys.shape[1], qkv.stride(0), qkv.stride(1), out.stride(0),
        scale / math.log(2), QUERIES=queries, SHARED=groups * queries // len(keys), SIZE=size, ROWS=rows, TOKENS=seen,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _tile(device: torch.device) -> tuple[int, int, int, int]:
    """Rows and cached tokens at a time, warps, stages: the fastest on an H100 of 24; fits in an Ampere GPU's memory."""
    if device.type != 'cuda':
        return 16, 16, 4, 1  # the interpreter: several steps in small tests
    return 64, 64, 4, 3 if torch.cuda.get_device_capability(device)[0] == 9 else 2
