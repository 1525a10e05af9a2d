"""Triton kernels for one new token: products of a vector with float or 4-bit weights, and attention over a cache.

A vector's product reads each weight once, so it takes as long as the memory needs: 4-bit weights are turned into floats
in registers, all layers that read one input go in one launch, and biases, adapters, the residual sum and the gate are
done by whoever has the row. All sums are float32. Nothing here waits for the host, so a CUDA graph can hold it: the
token's position is read from the GPU's own memory.

Letters of shapes: K inputs, N outputs of all weights side by side, R the largest rank, D a head's size.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtuner.model.kernels.quantized import QuantizedWeight

FLOAT, NF4, NESTED = 0, 1, 2  # forms of a weight: floats, 4 bit with float scales, 4 bit with quantised scales
_FIELDS = 6


@dataclass(frozen=True)
class Tile:
    """What one program of a product takes at a time: rows, bytes of a 4-bit row, warps."""

    rows: int = 8
    row_bytes: int = 1024
    warps: int = 4


@dataclass(frozen=True)
class Weights:
    """Up to three weights that read one input.

    Attributes:
        form: FLOAT, NF4 or NESTED; one for all.
        rows: Each weight's N.
        size: K.
        block: Values that share a scale.
        coarse: Scales that share a coarse one.
        addresses: int64 (weights, 6): where values, table, scales, the scales' table, coarse scales and offset lie.
        owners: The tensors that lie there.
        dtype: Of float weights.
    """

    form: int
    rows: tuple[int, ...]
    size: int
    block: int
    coarse: int
    addresses: Tensor
    owners: tuple
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        """N."""
        return sum(self.rows)


def weights_of(parts: list[QuantizedWeight] | list[Tensor]) -> Weights | str:
    """Prepares weights, all quantised or all float matrices (N, K); a string says why they cannot be."""
    first = parts[0]
    if len(parts) > 3:
        return f'{len(parts)} layers read the same input'
    if isinstance(first, Tensor):
        floats = [part for part in parts if isinstance(part, Tensor) and part.is_contiguous()]
        if len(floats) < len(parts) or len({part.dtype for part in floats}) > 1:
            return 'layers that read the same input have weights of several forms'
        owners, rows = [(part,) * _FIELDS for part in floats], tuple(len(part) for part in floats)
        form, size, block, coarse, dtype = FLOAT, first.shape[1], 2, 1, first.dtype
    else:
        packed = [part for part in parts if isinstance(part, QuantizedWeight)]
        same = {(p.block, p.absmax_block, p.absmax_table is None, p.absmax.dtype) for p in packed}
        if len(packed) < len(parts) or len(same) > 1:
            return 'layers that read the same input have weights of several forms'
        if first.shape[1] % first.block or first.block & (first.block - 1):
            return f'quantisation blocks of {first.block} do not fill rows of {first.shape[1]}'
        owners, rows = [_fields(part) for part in packed], tuple(part.shape[0] for part in packed)
        form, size, block, coarse = (NF4 if first.absmax_table is None else NESTED), first.shape[1], first.block, 1
        coarse, dtype = first.absmax_block, torch.uint8
    addresses = torch.tensor([[t.data_ptr() for t in own] for own in owners], dtype=torch.int64)
    return Weights(form, rows, size, block, coarse, addresses.to(owners[0][0].device), tuple(owners), dtype)


def _fields(part: QuantizedWeight) -> tuple[Tensor, ...]:
    inner = (part.absmax_table, part.absmax_scale, part.offset)
    return part.packed, part.table, part.absmax, *(part.table if t is None else t for t in inner)


@triton.jit
def _address(addresses, member, field: tl.constexpr):
    return tl.load(addresses + member * 6 + field)


@triton.jit
def _dot_float(addresses, member, x, row, num_rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    weight = tl.multiple_of(_address(addresses, member, 0).to(tl.pointer_type(x.dtype.element_ty)), 16)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    inside_row = row < num_rows
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < size
        value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        source = weight + row[:, None].to(tl.int64) * size + column[None, :]
        factor = tl.load(source, mask=inside_row[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += factor * value[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _dot_4bit(
    addresses, member, x, row, num_rows, row_blocks,
    IS_NESTED: tl.constexpr, COARSE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    packed = tl.multiple_of(_address(addresses, member, 0).to(tl.pointer_type(tl.uint8)), 16)
    table = tl.multiple_of(_address(addresses, member, 1).to(tl.pointer_type(tl.float32)), 4)
    if IS_NESTED:
        codes = _address(addresses, member, 2).to(tl.pointer_type(tl.uint8))
        fine = tl.multiple_of(_address(addresses, member, 3).to(tl.pointer_type(tl.float32)), 4)
        coarse = tl.multiple_of(_address(addresses, member, 4).to(tl.pointer_type(tl.float32)), 4)
        offset = tl.load(tl.multiple_of(_address(addresses, member, 5).to(tl.pointer_type(tl.float32)), 4))
    else:
        scales = tl.multiple_of(_address(addresses, member, 2).to(tl.pointer_type(tl.float32)), 4)
    total = tl.zeros((ROWS, BLOCKS, HALF), tl.float32)
    byte = tl.arange(0, HALF)
    first_block = row.to(tl.int64) * row_blocks
    for start in range(0, row_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = (row < num_rows)[:, None] & (block < row_blocks)[None, :]
        index = first_block[:, None] + block[None, :]
        pair = tl.load(packed + index[:, :, None] * HALF + byte[None, None, :], mask=inside[:, :, None], other=0)
        if IS_NESTED:
            code = tl.load(codes + index, mask=inside, other=0).to(tl.int32)
            scale = tl.load(fine + code) * tl.load(coarse + index // COARSE, mask=inside, other=0.0) + offset
        else:
            scale = tl.load(scales + index, mask=inside, other=0.0)
        place = (block[:, None] * HALF + byte[None, :]) * 2
        there = (block < row_blocks)[:, None]
        even = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        odd = tl.load(x + place + 1, mask=there, other=0.0).to(tl.float32)
        pair = pair.to(tl.int32)
        value = tl.load(table + (pair >> 4)) * even[None, :, :] + tl.load(table + (pair & 15)) * odd[None, :, :]
        total += value * scale[:, :, None]
    return tl.sum(tl.sum(total, axis=2), axis=1)


@triton.jit
def _dot(
    addresses, member, x, row, num_rows, size,
    FORM: tl.constexpr, COARSE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    if FORM == 0:
        return _dot_float(addresses, member, x, row, num_rows, size, ROWS, BLOCKS)
    return _dot_4bit(addresses, member, x, row, num_rows, size // (2 * HALF), FORM == 2, COARSE, HALF, ROWS, BLOCKS)


@triton.jit
def _low_rank(up, down, member, row, inside, RANK: tl.constexpr):
    column = tl.arange(0, RANK)
    factor = tl.load(up + row[:, None] * RANK + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    return tl.sum(factor * tl.load(down + member * RANK + column)[None, :], axis=1)


@triton.jit
def _multiply(
    addresses, x, bias, up, down, out, rows0, rows1, rows2, size,
    FORM: tl.constexpr, COARSE: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    second = tl.cdiv(rows0, ROWS)
    third = second + tl.cdiv(rows1, ROWS)
    member = (program >= second).to(tl.int32) + (program >= third).to(tl.int32)
    num_rows = tl.where(member == 0, rows0, tl.where(member == 1, rows1, rows2))
    before = tl.where(member == 0, 0, tl.where(member == 1, rows0, rows0 + rows1))
    at = program - tl.where(member == 0, 0, tl.where(member == 1, second, third))
    row = at * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    total = _dot(addresses, member, x, row, num_rows, size, FORM, COARSE, HALF, ROWS, BLOCKS)
    row = before + row
    if HAS_BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        total += _low_rank(up, down, member, row, inside, RANK)
    if ADD:
        total += tl.load(out + row, mask=inside, other=0.0)
    tl.store(out + row, total, mask=inside)


@triton.jit
def _multiply_gated(
    addresses, x, bias, up, down, out, rows, size,
    FORM: tl.constexpr, COARSE: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    gate = _dot(addresses, 0, x, row, rows, size, FORM, COARSE, HALF, ROWS, BLOCKS)
    raised = _dot(addresses, 1, x, row, rows, size, FORM, COARSE, HALF, ROWS, BLOCKS)
    if HAS_BIAS:
        gate += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        raised += tl.load(bias + rows + row, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        gate += _low_rank(up, down, 0, row, inside, RANK)
        raised += _low_rank(up, down, 1, rows + row, inside, RANK)
    tl.store(out + row, gate * tl.sigmoid(gate) * raised, mask=inside)


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
def _join(part, weight, out, pieces, SIZE: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
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
    tl.store(out + head * SIZE + column, total, mask=column < SIZE)


def _shape(weights: Weights, tile: Tile) -> dict[str, int]:
    """The constants of a product's tile; smaller where rows are short."""
    if weights.form == FLOAT:
        blocks = min(triton.next_power_of_2(weights.size), tile.row_bytes)
    else:
        blocks = min(triton.next_power_of_2(weights.size // weights.block), max(2 * tile.row_bytes // weights.block, 1))
    return {
        'FORM': weights.form, 'COARSE': weights.coarse, 'HALF': weights.block // 2, 'ROWS': tile.rows,
        'BLOCKS': blocks, 'num_warps': tile.warps,
    }  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """Adapters of up to three weights that read one input, each padded to the same rank.

    Attributes:
        down: (weights * R, K), scaling included.
        up: (N, R).
        rank: R, a power of 2.
    """

    down: Tensor
    up: Tensor
    rank: int


def project(low_rank: LowRank, x_K: Tensor, out: Tensor) -> None:
    """Writes `s A x`, float32 (weights * R,): what `multiply` takes as `down`."""
    rows, size = low_rank.down.shape
    floats = weights_of([low_rank.down])
    assert isinstance(floats, Weights)
    _multiply[(triton.cdiv(rows, 2),)](
        floats.addresses, x_K, out, out, out, out, rows, 0, 0, size, RANK=0, HAS_BIAS=False, ADD=False,
        **_shape(floats, Tile(rows=2)),
    )  # fmt: skip


def multiply(
    weights: Weights, x_K: Tensor, out_N: Tensor, *, bias_N: Tensor | None = None, low_rank: LowRank | None = None,
    down: Tensor | None = None, add: bool = False, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Writes `W x + bias + B down`, or adds it to what is there.

    Args:
        weights: W.
        x_K: The input; of the weights' dtype where they are floats.
        out_N: float32 where it is added to.
        bias_N: All layers' biases.
        low_rank: All layers' adapters.
        down: What `project` wrote for them.
        add: Whether to add.
        tile: None takes the default.
    """
    tile = tile or Tile()
    rows = (*weights.rows, 0, 0)
    programs = sum(triton.cdiv(n, tile.rows) for n in weights.rows)
    _multiply[(programs,)](
        weights.addresses, x_K, x_K if bias_N is None else bias_N, x_K if low_rank is None else low_rank.up,
        x_K if down is None else down, out_N, rows[0], rows[1], rows[2], weights.size,
        RANK=low_rank.rank if low_rank else 0, HAS_BIAS=bias_N is not None, ADD=add, **_shape(weights, tile),
    )  # fmt: skip


def multiply_gated(
    weights: Weights, x_K: Tensor, out_I: Tensor, *, bias_N: Tensor | None = None, low_rank: LowRank | None = None,
    down: Tensor | None = None, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Writes `silu(gate) * up` of two weights with as many rows."""
    tile = tile or Tile()
    _multiply_gated[(triton.cdiv(weights.rows[0], tile.rows),)](
        weights.addresses, x_K, x_K if bias_N is None else bias_N, x_K if low_rank is None else low_rank.up,
        x_K if down is None else down, out_I, weights.rows[0], weights.size,
        RANK=low_rank.rank if low_rank else 0, HAS_BIAS=bias_N is not None, **_shape(weights, tile),
    )  # fmt: skip


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
        self, query_ND: Tensor, keys: Tensor, values: Tensor, position: Tensor, out_ND: Tensor, scale: float
    ) -> None:
        """Attends to all tokens up to `position`, the token's own."""
        _attend[(self.heads, self.pieces)](
            query_ND, keys, values, position, self._part, self._weight, self.capacity, self.span, scale,
            GROUP=self.group, SIZE=self.size, BLOCK=self.block, TOKENS=32, num_warps=4,
        )  # fmt: skip
        _join[(self.heads,)](
            self._part, self._weight, out_ND, self.pieces, SIZE=self.size, BLOCK=self.block,
            PIECES=triton.next_power_of_2(self.pieces), num_warps=4,
        )  # fmt: skip
