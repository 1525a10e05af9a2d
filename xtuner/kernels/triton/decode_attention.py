"""Triton kernels for one new token beside its products: norm, rotation into the cache, attention over the cache.

Nothing here waits for the host, so a CUDA graph can hold it: the token's position is read from the GPU's own memory.
Outputs lie in the planes that the next product reads; see `fused_words`.

Letters of shapes: K a vector's size, N heads, D a head's size.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtuner.kernels.triton.nf4_lut import place


@triton.jit
def _norm(x, weight, out, size, eps, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(x + column, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place(column, size, PLANES), value * scale * factor, mask=inside)


@triton.jit
def _turn_and_store(
    qkv, cos, sin, position, query, keys, values, capacity, group_width, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, head = tl.program_id(0), tl.program_id(1)
    at = tl.load(position).to(tl.int64)
    half: tl.constexpr = SIZE // 2
    column = tl.arange(0, BLOCK)
    inside = column < half
    source = qkv + group * group_width + head * SIZE + column
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + half, mask=inside, other=0.0)
    if head < QUERIES + KEYS:
        c = tl.load(cos + at * half + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + at * half + column, mask=inside, other=0.0).to(tl.float32)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    if head < QUERIES:
        target = query + (group * QUERIES + head) * SIZE + column
        tl.store(target, first, mask=inside)
        tl.store(target + half, second, mask=inside)
    elif head < QUERIES + KEYS:
        slot = keys + ((group * KEYS + head - QUERIES) * capacity + at) * SIZE + column
        tl.store(slot, first, mask=inside)
        tl.store(slot + half, second, mask=inside)
    else:
        slot = values + ((group * KEYS + head - QUERIES - KEYS) * capacity + at) * SIZE + column
        tl.store(slot, first, mask=inside)
        tl.store(slot + half, second, mask=inside)


@triton.jit
def _attend(
    query, keys, values, position, part, weight, capacity, span, scale,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, piece, pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.load(position) + 1
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    q = tl.load(query + head * SIZE + column, mask=inside, other=0.0) * scale
    most = tl.full((), float('-inf'), tl.float32)
    mass = tl.zeros((), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    first = piece * span
    last = tl.minimum(first + span, length)
    base = (head // GROUP).to(tl.int64) * capacity
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        seen = token < last
        place = (base + token)[:, None] * SIZE + column[None, :]
        both = seen[:, None] & inside[None, :]
        k = tl.load(keys + place, mask=both, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=both, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(k * q[None, :], axis=1), float('-inf'))
        now = tl.maximum(most, tl.max(score, axis=0))
        shrink = tl.exp(most - now)
        share = tl.exp(score - now)
        mass = mass * shrink + tl.sum(share, axis=0)
        total = total * shrink + tl.sum(share[:, None] * v, axis=0)
        most = now
    tl.store(part + (head * pieces + piece) * BLOCK + column, total)
    tl.store(weight + (head * pieces + piece) * 2, most)
    tl.store(weight + (head * pieces + piece) * 2 + 1, mass)


@triton.jit
def _join(
    part, weight, out, pieces, size, SIZE: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
    PLANES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    piece = tl.arange(0, PIECES)
    there = piece < pieces
    most = tl.load(weight + (head * pieces + piece) * 2, mask=there, other=float('-inf'))
    mass = tl.load(weight + (head * pieces + piece) * 2 + 1, mask=there, other=0.0)
    share = tl.exp(most - tl.max(most, axis=0))
    source = part + (head * pieces + piece)[:, None] * BLOCK + column[None, :]
    value = tl.load(source, mask=there[:, None], other=0.0)
    total = tl.sum(value * share[:, None], axis=0) / tl.sum(mass * share, axis=0)
    tl.store(out + place(head * SIZE + column, size, PLANES), total, mask=column < SIZE)


def norm(x_K: Tensor, weight_K: Tensor, eps: float, out_K: Tensor, *, planes: int) -> None:
    """Writes `x / rms(x) * weight` of one vector, in planes."""
    size = x_K.numel()
    _norm[(1,)](x_K, weight_K, out_K, size, eps, PLANES=planes, BLOCK=triton.next_power_of_2(size), num_warps=8)


def turn_and_store(
    qkv: Tensor, angles: tuple[Tensor, Tensor], position: Tensor, query_ND: Tensor, keys: Tensor, values: Tensor,
    *, queries: int,
) -> None:  # fmt: skip
    """Rotates a token's queries and keys and writes keys and values to their places in the cache.

    Args:
        qkv: float32 (groups, heads of a group, D): queries, keys, values.
        angles: Cosines and sines of all positions, (capacity, D / 2).
        position: int32 scalar.
        query_ND: float32, where the queries go.
        keys: (N, capacity, D).
        values: Likewise.
        queries: Query heads of a group.
    """
    groups, heads, size = qkv.shape
    _turn_and_store[(groups, heads)](
        qkv, *angles, position, query_ND, keys, values, keys.shape[1], heads * size, QUERIES=queries,
        KEYS=(heads - queries) // 2, SIZE=size, BLOCK=triton.next_power_of_2(size // 2), num_warps=1,
    )  # fmt: skip


class Attention:
    """One token's attention over a cache, in pieces that are joined.

    Args:
        heads: Query heads.
        keys: (key heads, capacity, D), like all caches that will be attended to.
    """

    def __init__(self, heads: int, keys: Tensor) -> None:
        self.heads, self.group, (_, self.capacity, self.size) = heads, heads // keys.shape[0], keys.shape
        self.span = max(128, triton.cdiv(self.capacity, 32))
        self.pieces = triton.cdiv(self.capacity, self.span)
        self.block = triton.next_power_of_2(self.size)
        self._part = torch.empty(heads, self.pieces, self.block, device=keys.device)
        self._weight = torch.empty(heads, self.pieces, 2, device=keys.device)

    def __call__(
        self, query_ND: Tensor, keys: Tensor, values: Tensor, position: Tensor, out_ND: Tensor, scale: float,
        *, planes: int = 1,
    ) -> None:  # fmt: skip
        """Attends to all tokens up to `position`, the token's own; writes all heads' outputs in planes."""
        _attend[(self.heads, self.pieces)](
            query_ND, keys, values, position, self._part, self._weight, self.capacity, self.span, scale,
            GROUP=self.group, SIZE=self.size, BLOCK=self.block, TOKENS=32, num_warps=4,
        )  # fmt: skip
        _join[(self.heads,)](
            self._part, self._weight, out_ND, self.pieces, self.heads * self.size, SIZE=self.size, BLOCK=self.block,
            PIECES=triton.next_power_of_2(self.pieces), PLANES=planes, num_warps=4,
        )  # fmt: skip
