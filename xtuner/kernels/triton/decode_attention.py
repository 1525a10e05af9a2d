"""Triton kernels for decoding one token: norm, RoPE with cache write, attention over the KV cache.

Nothing here synchronizes with the host, so that CUDA graphs can capture it: the token's position is read from GPU
memory. Outputs have the plane layout that the next product reads; see `nf4_lut`.

Shape letters: K vector size, N heads, D head size.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtuner.kernels.triton.nf4_lut import plane_offset


@triton.jit
def _norm(x, weight, out, size, eps, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(x + column, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + plane_offset(column, size, PLANES), value * scale * factor, mask=inside)


@triton.jit
def _rope_and_store(
    qkv, cos, sin, position, query, keys, values, capacity, group_width, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, head = tl.program_id(0), tl.program_id(1)
    pos = tl.load(position).to(tl.int64)
    half: tl.constexpr = SIZE // 2
    column = tl.arange(0, BLOCK)
    inside = column < half
    source = qkv + group * group_width + head * SIZE + column
    x1 = tl.load(source, mask=inside, other=0.0)
    x2 = tl.load(source + half, mask=inside, other=0.0)
    if head < QUERIES + KEYS:
        c = tl.load(cos + pos * half + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + pos * half + column, mask=inside, other=0.0).to(tl.float32)
        rotated = x1 * c - x2 * s
        x2 = x2 * c + x1 * s
        x1 = rotated
    if head < QUERIES:
        target = query + (group * QUERIES + head) * SIZE + column
        tl.store(target, x1, mask=inside)
        tl.store(target + half, x2, mask=inside)
    elif head < QUERIES + KEYS:
        slot = keys + ((group * KEYS + head - QUERIES) * capacity + pos) * SIZE + column
        tl.store(slot, x1, mask=inside)
        tl.store(slot + half, x2, mask=inside)
    else:
        slot = values + ((group * KEYS + head - QUERIES - KEYS) * capacity + pos) * SIZE + column
        tl.store(slot, x1, mask=inside)
        tl.store(slot + half, x2, mask=inside)


@triton.jit
def _attend(
    query, keys, values, position, part_acc, part_stats, capacity, span, scale,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.load(position) + 1
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    q = tl.load(query + head * SIZE + column, mask=inside, other=0.0) * scale
    row_max = tl.full((), float('-inf'), tl.float32)
    row_sum = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    first = part * span
    last = tl.minimum(first + span, length)
    base = (head // GROUP).to(tl.int64) * capacity
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        valid = token < last
        offset = (base + token)[:, None] * SIZE + column[None, :]
        mask = valid[:, None] & inside[None, :]
        k = tl.load(keys + offset, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + offset, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(valid, tl.sum(k * q[None, :], axis=1), float('-inf'))
        new_max = tl.maximum(row_max, tl.max(score, axis=0))
        rescale = tl.exp(row_max - new_max)
        probs = tl.exp(score - new_max)
        row_sum = row_sum * rescale + tl.sum(probs, axis=0)
        acc = acc * rescale + tl.sum(probs[:, None] * v, axis=0)
        row_max = new_max
    tl.store(part_acc + (head * parts + part) * BLOCK + column, acc)
    tl.store(part_stats + (head * parts + part) * 2, row_max)
    tl.store(part_stats + (head * parts + part) * 2 + 1, row_sum)


@triton.jit
def _combine(
    part_acc, part_stats, out, parts, size, SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    PLANES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    mask = part < parts
    row_max = tl.load(part_stats + (head * parts + part) * 2, mask=mask, other=float('-inf'))
    row_sum = tl.load(part_stats + (head * parts + part) * 2 + 1, mask=mask, other=0.0)
    rescale = tl.exp(row_max - tl.max(row_max, axis=0))
    source = part_acc + (head * parts + part)[:, None] * BLOCK + column[None, :]
    value = tl.load(source, mask=mask[:, None], other=0.0)
    acc = tl.sum(value * rescale[:, None], axis=0) / tl.sum(row_sum * rescale, axis=0)
    tl.store(out + plane_offset(head * SIZE + column, size, PLANES), acc, mask=column < SIZE)


def norm(x_K: Tensor, weight_K: Tensor, eps: float, out_K: Tensor, *, planes: int) -> None:
    """Writes `x / rms(x) * weight` of one vector in plane layout."""
    size = x_K.numel()
    _norm[(1,)](x_K, weight_K, out_K, size, eps, PLANES=planes, BLOCK=triton.next_power_of_2(size), num_warps=8)


def rope_and_store(
    qkv: Tensor, angles: tuple[Tensor, Tensor], position: Tensor, query_ND: Tensor, keys: Tensor, values: Tensor,
    *, queries: int,
) -> None:  # fmt: skip
    """Applies RoPE to a token's queries and keys and writes keys and values to the cache.

    Args:
        qkv: float32 (groups, heads of a group, D): queries, keys, values.
        angles: Cosines and sines of all positions, (capacity, D / 2).
        position: int32 scalar.
        query_ND: float32, output for the queries.
        keys: Key cache, (N, capacity, D).
        values: Value cache, same shape.
        queries: Query heads per group.
    """
    groups, heads, size = qkv.shape
    _rope_and_store[(groups, heads)](
        qkv, *angles, position, query_ND, keys, values, keys.shape[1], heads * size, QUERIES=queries,
        KEYS=(heads - queries) // 2, SIZE=size, BLOCK=triton.next_power_of_2(size // 2), num_warps=1,
    )  # fmt: skip


class DecodeAttention:
    """Attention of one token over a KV cache, split into parts whose results are combined (split-K).

    Args:
        heads: Query heads.
        keys: (key heads, capacity, D), the shape of every cache that will be attended to.
    """

    def __init__(self, heads: int, keys: Tensor) -> None:
        self.heads, self.group, (_, self.capacity, self.size) = heads, heads // keys.shape[0], keys.shape
        self.span = max(128, triton.cdiv(self.capacity, 32))
        self.parts = triton.cdiv(self.capacity, self.span)
        self.block = triton.next_power_of_2(self.size)
        self._part_acc = torch.empty(heads, self.parts, self.block, device=keys.device)
        self._part_stats = torch.empty(heads, self.parts, 2, device=keys.device)

    def __call__(
        self, query_ND: Tensor, keys: Tensor, values: Tensor, position: Tensor, out_ND: Tensor, scale: float,
        *, planes: int = 1,
    ) -> None:  # fmt: skip
        """Attends to all tokens up to and including `position`; writes all heads' outputs in plane layout."""
        _attend[(self.heads, self.parts)](
            query_ND, keys, values, position, self._part_acc, self._part_stats, self.capacity, self.span, scale,
            GROUP=self.group, SIZE=self.size, BLOCK=self.block, TOKENS=32, num_warps=4,
        )  # fmt: skip
        _combine[(self.heads,)](
            self._part_acc, self._part_stats, out_ND, self.parts, self.heads * self.size, SIZE=self.size,
            BLOCK=self.block, PARTS=triton.next_power_of_2(self.parts), PLANES=planes, num_warps=4,
        )  # fmt: skip
