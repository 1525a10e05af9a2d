"""Triton kernels for matrix-vector products (GEMV) with float or 4-bit weights.

Each weight is read once: 4-bit weights are dequantized in registers (see `nf4_lut`), all layers with the same input run
in one launch, and the program that owns a row also applies bias, LoRA, residual and gate. Vectors and sums are float32.
Nothing synchronizes with the host.

Shape letters: K inputs, N outputs of all weights concatenated, R the largest rank.
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
from xtuner.kernels.triton.nf4_lut import IN_REGISTERS, WORD, load_plane, plane_offset, table_words, word_sum

FLOAT, NF4, NESTED = 0, 1, 2  # weight formats: float, 4-bit with float scales, 4-bit with quantized scales
_FIELDS = 6
_NO_TABLE: tuple[int, ...] = (0,) * 8
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Tile:
    """Work of one program at a time: rows, bytes of a 4-bit row, warps."""

    rows: int = 4
    row_bytes: int = 2048
    warps: int = 4


@dataclass(frozen=True)
class GemvWeights:
    """Up to three weights with the same input.

    Attributes:
        form: FLOAT, NF4 or NESTED; the same for all.
        rows: Each weight's N.
        size: K.
        block: Values per scale.
        coarse: Scales per coarse scale.
        addresses: int64 (weights, 14): addresses of values, table, scales, the scales' table, coarse scales and offset,
            and the eight words of `table_words`.
        owners: The tensors at these addresses, kept alive.
        dtype: Dtype of float weights.
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
        """Number of planes in the input's layout."""
        return 1 if self.form == FLOAT else WORD


def gemv_weights(parts: list[QuantizedWeight] | list[Tensor]) -> GemvWeights | str:
    """Prepares weights, all quantized or all float matrices (N, K); returns the unsupported reason as a string."""
    first = parts[0]
    if len(parts) > 3:
        return f'{len(parts)} layers have the same input'
    if isinstance(first, Tensor):
        floats = [part for part in parts if isinstance(part, Tensor) and part.is_contiguous()]
        if len(floats) < len(parts) or len({part.dtype for part in floats}) > 1:
            return 'layers with the same input have weights in different formats'
        owners, rows = [(part,) * _FIELDS for part in floats], tuple(len(part) for part in floats)
        form, size, block, coarse, dtype = FLOAT, first.shape[1], WORD, 1, first.dtype
        words = [_NO_TABLE for _ in floats]
    else:
        packed = [part for part in parts if isinstance(part, QuantizedWeight)]
        formats = {(part.block, part.absmax_block, part.absmax_table is None) for part in packed}
        if len(packed) < len(parts) or len(formats) > 1:
            return 'layers with the same input have weights in different formats'
        if first.shape[1] % first.block or first.block & (first.block - 1) or first.block < WORD:
            return f'rows of {first.shape[1]} are not a multiple of the quantization block {first.block}'
        owners, rows = [_fields(part) for part in packed], tuple(part.shape[0] for part in packed)
        form, size, block = (NF4 if first.absmax_table is None else NESTED), first.shape[1], first.block
        coarse, dtype = first.absmax_block, torch.float32
        words = [table_words(part.table) for part in packed]
    entries = [[*(t.data_ptr() for t in tensors), *rest] for tensors, rest in zip(owners, words, strict=True)]
    addresses = torch.tensor(entries, dtype=torch.int64)
    return GemvWeights(form, rows, size, block, coarse, addresses.to(owners[0][0].device), tuple(owners), dtype)


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
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    inside_row = row < num_rows
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < size
        value = tl.load(x + column, mask=inside, other=0.0)
        source = weight + row[:, None].to(tl.int64) * size + column[None, :]
        factor = tl.load(source, mask=inside_row[:, None] & inside[None, :], other=0.0).to(tl.float32)
        acc += factor * value[None, :]
    return tl.sum(acc, axis=1)


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
        mean = tl.load(tl.multiple_of(_address(addresses, member, 5).to(tl.pointer_type(tl.float32)), 4))
    else:
        scales = tl.multiple_of(_address(addresses, member, 2).to(tl.pointer_type(tl.float32)), 4)
    low0, low1 = _address(addresses, member, 6).to(tl.int32), _address(addresses, member, 7).to(tl.int32)
    low2, low3 = _address(addresses, member, 8).to(tl.int32), _address(addresses, member, 9).to(tl.int32)
    high0, high1 = _address(addresses, member, 10).to(tl.int32), _address(addresses, member, 11).to(tl.int32)
    high2, high3 = _address(addresses, member, 12).to(tl.int32), _address(addresses, member, 13).to(tl.int32)
    row_blocks = size // (8 * WORDS)
    acc = tl.zeros((ROWS, BLOCKS, WORDS), tl.float32)
    number = tl.arange(0, WORDS)
    first_block = row.to(tl.int64) * row_blocks
    for start in range(0, row_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = (row < num_rows)[:, None] & (block < row_blocks)[None, :]
        index = first_block[:, None] + block[None, :]
        word = tl.load(packed + index[:, :, None] * WORDS + number[None, None, :], mask=inside[:, :, None], other=0)
        if IS_NESTED:
            code = tl.load(codes + index, mask=inside, other=0).to(tl.int32)
            scale = tl.load(fine + code) * tl.load(coarse + index // COARSE, mask=inside, other=0.0) + mean
        else:
            scale = tl.load(scales + index, mask=inside, other=0.0)
        # Three-dimensional from the start: Triton then uses the words' own layout and moves no data.
        offset = block[None, :, None] * WORDS + number[None, None, :]
        mask = (block < row_blocks)[None, :, None]
        part = word_sum(
            word, load_plane(x, offset, mask, size, 0), load_plane(x, offset, mask, size, 1),
            load_plane(x, offset, mask, size, 2), load_plane(x, offset, mask, size, 3),
            load_plane(x, offset, mask, size, 4), load_plane(x, offset, mask, size, 5),
            load_plane(x, offset, mask, size, 6), load_plane(x, offset, mask, size, 7),
            table, low0, low1, low2, low3, high0, high1, high2, high3, IN_REGISTERS,
        )  # fmt: skip
        acc += part * scale[:, :, None]
    return tl.sum(tl.sum(acc, axis=2), axis=1)


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
def _lora(lora_b, lora_ax, member, row, inside, RANK: tl.constexpr):
    column = tl.arange(0, RANK)
    factor = tl.load(lora_b + row[:, None] * RANK + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    return tl.sum(factor * tl.load(lora_ax + member * RANK + column)[None, :], axis=1)


@triton.jit
def _multiply(
    addresses, x, bias, lora_b, lora_ax, out, rows0, rows1, rows2, size,
    FORM: tl.constexpr, DTYPE: tl.constexpr, COARSE: tl.constexpr, WORDS: tl.constexpr, RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    start1 = tl.cdiv(rows0, ROWS)
    start2 = start1 + tl.cdiv(rows1, ROWS)
    member = (program >= start1).to(tl.int32) + (program >= start2).to(tl.int32)
    num_rows = tl.where(member == 0, rows0, tl.where(member == 1, rows1, rows2))
    before = tl.where(member == 0, 0, tl.where(member == 1, rows0, rows0 + rows1))
    tile = program - tl.where(member == 0, 0, tl.where(member == 1, start1, start2))
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    acc = _dot(
        addresses, member, x, row, num_rows, size, FORM, DTYPE, COARSE, WORDS, ROWS, BLOCKS, IN_REGISTERS
    )  # fmt: skip
    row = before + row
    if HAS_BIAS:
        acc += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        acc += _lora(lora_b, lora_ax, member, row, inside, RANK)
    if ADD:
        acc += tl.load(out + row, mask=inside, other=0.0)
    tl.store(out + row, acc, mask=inside)


@triton.jit
def _multiply_gated(
    addresses, x, bias, lora_b, lora_ax, out, rows, size,
    FORM: tl.constexpr, DTYPE: tl.constexpr, COARSE: tl.constexpr, WORDS: tl.constexpr, RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    gate = _dot(addresses, 0, x, row, rows, size, FORM, DTYPE, COARSE, WORDS, ROWS, BLOCKS, IN_REGISTERS)
    up = _dot(addresses, 1, x, row, rows, size, FORM, DTYPE, COARSE, WORDS, ROWS, BLOCKS, IN_REGISTERS)
    if HAS_BIAS:
        gate += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(bias + rows + row, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        gate += _lora(lora_b, lora_ax, 0, row, inside, RANK)
        up += _lora(lora_b, lora_ax, 1, rows + row, inside, RANK)
    tl.store(out + plane_offset(row, rows, PLANES), gate * tl.sigmoid(gate) * up, mask=inside)


def _constants(weights: GemvWeights, tile: Tile) -> dict[str, Any]:
    """Compile-time constants of a product's kernel; the tile is smaller for short rows."""
    if weights.form == FLOAT:
        blocks = min(triton.next_power_of_2(weights.size), tile.row_bytes // 2)
    else:
        blocks = min(triton.next_power_of_2(weights.size // weights.block), max(2 * tile.row_bytes // weights.block, 1))
    return {
        'FORM': weights.form, 'DTYPE': _DTYPES[weights.dtype], 'COARSE': weights.coarse, 'WORDS': weights.block // WORD,
        'ROWS': tile.rows, 'BLOCKS': blocks, 'IN_REGISTERS': IN_REGISTERS, 'num_warps': tile.warps,
    }  # fmt: skip


@dataclass(frozen=True)
class GemvLora:
    """LoRA matrices of up to three weights with the same input, padded to a common rank.

    Attributes:
        a: (weights * R, K), scaling included; columns in the input's plane order.
        b: (N, R).
        rank: R, a power of 2.
    """

    a: Tensor
    b: Tensor
    rank: int
    weights: GemvWeights = field(init=False)

    def __post_init__(self) -> None:
        weights = gemv_weights([self.a])
        assert isinstance(weights, GemvWeights)
        object.__setattr__(self, 'weights', weights)


def project(lora: GemvLora, x_K: Tensor, out: Tensor) -> None:
    """Writes `s A x`, float32 (weights * R,): the `lora_ax` of `multiply`."""
    rows, size = lora.a.shape
    weights = lora.weights
    _multiply[(triton.cdiv(rows, 2),)](
        weights.addresses, x_K, out, out, out, out, rows, 0, 0, size, RANK=0, HAS_BIAS=False, ADD=False,
        **_constants(weights, Tile(rows=2)),
    )  # fmt: skip


def multiply(
    weights: GemvWeights, x_K: Tensor, out_N: Tensor, *, bias_N: Tensor | None = None, lora: GemvLora | None = None,
    lora_ax: Tensor | None = None, add: bool = False, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Writes `W x + bias + B (s A x)`, or adds it to the output.

    Args:
        weights: W.
        x_K: The input, float32, in the weights' planes.
        out_N: Output, float32 if it is added to.
        bias_N: Biases of all layers.
        lora: LoRA matrices of all layers.
        lora_ax: The output of `project`.
        add: Whether to add to `out_N`.
        tile: None uses the default.
    """
    tile = tile or Tile()
    rows = (*weights.rows, 0, 0)
    programs = sum(triton.cdiv(n, tile.rows) for n in weights.rows)
    _multiply[(programs,)](
        weights.addresses, x_K, x_K if bias_N is None else bias_N, x_K if lora is None else lora.b,
        x_K if lora_ax is None else lora_ax, out_N, rows[0], rows[1], rows[2], weights.size,
        RANK=lora.rank if lora else 0, HAS_BIAS=bias_N is not None, ADD=add, **_constants(weights, tile),
    )  # fmt: skip


def multiply_gated(
    weights: GemvWeights, x_K: Tensor, out_I: Tensor, *, bias_N: Tensor | None = None, lora: GemvLora | None = None,
    lora_ax: Tensor | None = None, planes: int = 1, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Writes `silu(gate) * up` of two weights of equal size, in plane layout."""
    tile = tile or Tile()
    _multiply_gated[(triton.cdiv(weights.rows[0], tile.rows),)](
        weights.addresses, x_K, x_K if bias_N is None else bias_N, x_K if lora is None else lora.b,
        x_K if lora_ax is None else lora_ax, out_I, weights.rows[0], weights.size, PLANES=planes,
        RANK=lora.rank if lora else 0, HAS_BIAS=bias_N is not None, **_constants(weights, tile),
    )  # fmt: skip
