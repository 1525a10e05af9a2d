"""Triton kernels for the product of one vector with float or 4-bit weights.

Each weight is read once: 4-bit weights are turned into floats in registers (see `fused_words`), all layers that read
one input go in one launch, and biases, adapters, the residual sum and the gate are done by whoever has the row. Vectors
and sums are float32. Nothing waits for the host.

Letters of shapes: K inputs, N outputs of all weights side by side, R the largest rank.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtuner.kernels.quantized import QuantizedWeight
from xtuner.kernels.triton.nf4_lut import IN_REGISTERS, WORD, place, plane, table_words, word_sum

FLOAT, NF4, NESTED = 0, 1, 2  # forms of a weight: floats, 4 bit with float scales, 4 bit with quantised scales
_FIELDS = 6
_NO_TABLE: tuple[int, ...] = (0,) * 8
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Tile:
    """What one program of a product takes at a time: rows, bytes of a 4-bit row, warps."""

    rows: int = 4
    row_bytes: int = 2048
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
        addresses: int64 (weights, 14): where values, table, scales, the scales' table, coarse scales and offset lie,
            and the eight words of `table_words`.
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
    def planes(self) -> int:
        """How many planes the input lies in."""
        return 1 if self.form == FLOAT else WORD


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
        form, size, block, coarse, dtype = FLOAT, first.shape[1], WORD, 1, first.dtype
        words = [_NO_TABLE for _ in floats]
    else:
        packed = [part for part in parts if isinstance(part, QuantizedWeight)]
        same = {(part.block, part.absmax_block, part.absmax_table is None) for part in packed}
        if len(packed) < len(parts) or len(same) > 1:
            return 'layers that read the same input have weights of several forms'
        if first.shape[1] % first.block or first.block & (first.block - 1) or first.block < WORD:
            return f'quantisation blocks of {first.block} do not fill rows of {first.shape[1]}'
        owners, rows = [_fields(part) for part in packed], tuple(part.shape[0] for part in packed)
        form, size, block = (NF4 if first.absmax_table is None else NESTED), first.shape[1], first.block
        coarse, dtype = first.absmax_block, torch.float32
        words = [table_words(part.table) for part in packed]
    entries = [[*(t.data_ptr() for t in own), *rest] for own, rest in zip(owners, words, strict=True)]
    addresses = torch.tensor(entries, dtype=torch.int64)
    return Weights(form, rows, size, block, coarse, addresses.to(owners[0][0].device), tuple(owners), dtype)


def _fields(part: QuantizedWeight) -> tuple[Tensor, ...]:
    inner = (part.absmax_table, part.absmax_scale, part.offset)
    return part.packed, part.table, part.absmax, *(part.table if t is None else t for t in inner)


@triton.jit
def _address(addresses, member, field: tl.constexpr):
    return tl.load(addresses + member * 14 + field)


@triton.jit
def _dot_float(
    addresses, member, x, row, num_rows, size, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    weight = tl.multiple_of(_address(addresses, member, 0).to(tl.pointer_type(DTYPE)), 16)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    inside_row = row < num_rows
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < size
        value = tl.load(x + column, mask=inside, other=0.0)
        source = weight + row[:, None].to(tl.int64) * size + column[None, :]
        factor = tl.load(source, mask=inside_row[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += factor * value[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _dot_4bit(
    addresses, member, x, row, num_rows, size,
    IS_NESTED: tl.constexpr, COARSE: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    packed = tl.multiple_of(_address(addresses, member, 0).to(tl.pointer_type(tl.int32)), 16)
    table = tl.multiple_of(_address(addresses, member, 1).to(tl.pointer_type(tl.float32)), 4)
    if IS_NESTED:
        codes = _address(addresses, member, 2).to(tl.pointer_type(tl.uint8))
        fine = tl.multiple_of(_address(addresses, member, 3).to(tl.pointer_type(tl.float32)), 4)
        coarse = tl.multiple_of(_address(addresses, member, 4).to(tl.pointer_type(tl.float32)), 4)
        offset = tl.load(tl.multiple_of(_address(addresses, member, 5).to(tl.pointer_type(tl.float32)), 4))
    else:
        scales = tl.multiple_of(_address(addresses, member, 2).to(tl.pointer_type(tl.float32)), 4)
    low0, low1 = _address(addresses, member, 6).to(tl.int32), _address(addresses, member, 7).to(tl.int32)
    low2, low3 = _address(addresses, member, 8).to(tl.int32), _address(addresses, member, 9).to(tl.int32)
    high0, high1 = _address(addresses, member, 10).to(tl.int32), _address(addresses, member, 11).to(tl.int32)
    high2, high3 = _address(addresses, member, 12).to(tl.int32), _address(addresses, member, 13).to(tl.int32)
    row_blocks = size // (8 * WORDS)
    total = tl.zeros((ROWS, BLOCKS, WORDS), tl.float32)
    number = tl.arange(0, WORDS)
    first_block = row.to(tl.int64) * row_blocks
    for start in range(0, row_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = (row < num_rows)[:, None] & (block < row_blocks)[None, :]
        index = first_block[:, None] + block[None, :]
        word = tl.load(packed + index[:, :, None] * WORDS + number[None, None, :], mask=inside[:, :, None], other=0)
        if IS_NESTED:
            code = tl.load(codes + index, mask=inside, other=0).to(tl.int32)
            scale = tl.load(fine + code) * tl.load(coarse + index // COARSE, mask=inside, other=0.0) + offset
        else:
            scale = tl.load(scales + index, mask=inside, other=0.0)
        # In three dimensions from the start: Triton then gives them the words' own layout, and nothing is moved.
        place = block[None, :, None] * WORDS + number[None, None, :]
        there = (block < row_blocks)[None, :, None]
        part = word_sum(
            word, plane(x, place, there, size, 0), plane(x, place, there, size, 1), plane(x, place, there, size, 2),
            plane(x, place, there, size, 3), plane(x, place, there, size, 4), plane(x, place, there, size, 5),
            plane(x, place, there, size, 6), plane(x, place, there, size, 7), table, low0, low1, low2, low3, high0,
            high1, high2, high3, IN_REGISTERS,
        )  # fmt: skip
        total += part * scale[:, :, None]
    return tl.sum(tl.sum(total, axis=2), axis=1)


@triton.jit
def _dot(
    addresses, member, x, row, num_rows, size,
    FORM: tl.constexpr, DTYPE: tl.constexpr, COARSE: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    if FORM == 0:
        return _dot_float(addresses, member, x, row, num_rows, size, DTYPE, ROWS, BLOCKS)
    return _dot_4bit(addresses, member, x, row, num_rows, size, FORM == 2, COARSE, WORDS, ROWS, BLOCKS, IN_REGISTERS)


@triton.jit
def _low_rank(up, down, member, row, inside, RANK: tl.constexpr):
    column = tl.arange(0, RANK)
    factor = tl.load(up + row[:, None] * RANK + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    return tl.sum(factor * tl.load(down + member * RANK + column)[None, :], axis=1)


@triton.jit
def _multiply(
    addresses, x, bias, up, down, out, rows0, rows1, rows2, size,
    FORM: tl.constexpr, DTYPE: tl.constexpr, COARSE: tl.constexpr, WORDS: tl.constexpr, RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, IN_REGISTERS: tl.constexpr,
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
    total = _dot(
        addresses, member, x, row, num_rows, size, FORM, DTYPE, COARSE, WORDS, ROWS, BLOCKS, IN_REGISTERS
    )  # fmt: skip
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
    FORM: tl.constexpr, DTYPE: tl.constexpr, COARSE: tl.constexpr, WORDS: tl.constexpr, RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    gate = _dot(addresses, 0, x, row, rows, size, FORM, DTYPE, COARSE, WORDS, ROWS, BLOCKS, IN_REGISTERS)
    raised = _dot(addresses, 1, x, row, rows, size, FORM, DTYPE, COARSE, WORDS, ROWS, BLOCKS, IN_REGISTERS)
    if HAS_BIAS:
        gate += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        raised += tl.load(bias + rows + row, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        gate += _low_rank(up, down, 0, row, inside, RANK)
        raised += _low_rank(up, down, 1, rows + row, inside, RANK)
    tl.store(out + place(row, rows, PLANES), gate * tl.sigmoid(gate) * raised, mask=inside)


def _constants(weights: Weights, tile: Tile) -> dict[str, Any]:
    """What a product's kernel is compiled for; the tile is smaller where rows are short."""
    if weights.form == FLOAT:
        blocks = min(triton.next_power_of_2(weights.size), tile.row_bytes // 2)
    else:
        blocks = min(triton.next_power_of_2(weights.size // weights.block), max(2 * tile.row_bytes // weights.block, 1))
    return {
        'FORM': weights.form, 'DTYPE': _DTYPES[weights.dtype], 'COARSE': weights.coarse, 'WORDS': weights.block // WORD,
        'ROWS': tile.rows, 'BLOCKS': blocks, 'IN_REGISTERS': IN_REGISTERS, 'num_warps': tile.warps,
    }  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """Adapters of up to three weights that read one input, each padded to the same rank.

    Attributes:
        down: (weights * R, K), scaling included; columns in the order in which the input lies.
        up: (N, R).
        rank: R, a power of 2.
    """

    down: Tensor
    up: Tensor
    rank: int
    weights: Weights = field(init=False)

    def __post_init__(self) -> None:
        weights = weights_of([self.down])
        assert isinstance(weights, Weights)
        object.__setattr__(self, 'weights', weights)


def project(low_rank: LowRank, x_K: Tensor, out: Tensor) -> None:
    """Writes `s A x`, float32 (weights * R,): what `multiply` takes as `down`."""
    rows, size = low_rank.down.shape
    weights = low_rank.weights
    _multiply[(triton.cdiv(rows, 2),)](
        weights.addresses, x_K, out, out, out, out, rows, 0, 0, size, RANK=0, HAS_BIAS=False, ADD=False,
        **_constants(weights, Tile(rows=2)),
    )  # fmt: skip


def multiply(
    weights: Weights, x_K: Tensor, out_N: Tensor, *, bias_N: Tensor | None = None, low_rank: LowRank | None = None,
    down: Tensor | None = None, add: bool = False, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Writes `W x + bias + B down`, or adds it to what is there.

    Args:
        weights: W.
        x_K: The input, float32, in the weights' planes.
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
        RANK=low_rank.rank if low_rank else 0, HAS_BIAS=bias_N is not None, ADD=add, **_constants(weights, tile),
    )  # fmt: skip


def multiply_gated(
    weights: Weights, x_K: Tensor, out_I: Tensor, *, bias_N: Tensor | None = None, low_rank: LowRank | None = None,
    down: Tensor | None = None, planes: int = 1, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Writes `silu(gate) * up` of two weights with as many rows, in planes."""
    tile = tile or Tile()
    _multiply_gated[(triton.cdiv(weights.rows[0], tile.rows),)](
        weights.addresses, x_K, x_K if bias_N is None else bias_N, x_K if low_rank is None else low_rank.up,
        x_K if down is None else down, out_I, weights.rows[0], weights.size, PLANES=planes,
        RANK=low_rank.rank if low_rank else 0, HAS_BIAS=bias_N is not None, **_constants(weights, tile),
    )  # fmt: skip
