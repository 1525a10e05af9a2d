"""Dequantizes 4-bit weights, eight per 32-bit word, inside Triton kernels by a lookup table (LUT) in registers.

On a GPU, byte permutations select the values from the table in float16: 5 instructions per weight, against 11 for
reading the table from memory. The table is in [-1, 1], where the rounding error of float16 is an eighth of bfloat16's.

The input of 4-bit weights has eight planes (the first inputs of all words, the second inputs, and so on), so that the
inputs that a thread needs are adjacent.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 8  # 4-bit weights per word, and planes of their input
IN_REGISTERS = os.environ.get('TRITON_INTERPRET') != '1'  # the interpreter has no assembly and reads the table instead


def table_words(table: Tensor) -> tuple[int, ...]:
    """The table's values in float16: their low bytes, four per word, followed by their high bytes."""
    halves = table.detach().cpu().half().view(torch.uint8).view(16, 2)
    return tuple(halves.t().contiguous().view(torch.int32).reshape(-1).tolist())


# The sum of a word's eight values times their inputs. $0: the sum; $1: the word; $2 to $9: the inputs; $10 to $13 and
# $14 to $17: the table's low and high bytes. A permutation selects bytes by the low three bits of each code; the fourth
# bit selects one of the two halves of the table. The high code of a byte comes first.
WORD_SUM = tl.constexpr("""
{
.reg .b32 code, side, p, q, low, high, first, second;
.reg .b16 u, v;
.reg .f32 f, s;
and.b32 code, $1, 0x77777777;
shr.u32 side, $1, 1;
and.b32 side, side, 0x44444444;
or.b32 side, side, 0x32103210;
prmt.b32 p, $10, $11, code;
prmt.b32 q, $12, $13, code;
prmt.b32 low, p, q, side;
prmt.b32 p, $14, $15, code;
prmt.b32 q, $16, $17, code;
prmt.b32 high, p, q, side;
prmt.b32 first, low, high, 0x5140;
prmt.b32 second, low, high, 0x7362;
mov.b32 {u, v}, first;
cvt.f32.f16 f, u;
mul.f32 s, f, $3;
cvt.f32.f16 f, v;
fma.rn.f32 s, f, $2, s;
mov.b32 {u, v}, second;
cvt.f32.f16 f, u;
fma.rn.f32 s, f, $5, s;
cvt.f32.f16 f, v;
fma.rn.f32 s, f, $4, s;
shr.u32 code, code, 16;
shr.u32 side, side, 16;
prmt.b32 p, $10, $11, code;
prmt.b32 q, $12, $13, code;
prmt.b32 low, p, q, side;
prmt.b32 p, $14, $15, code;
prmt.b32 q, $16, $17, code;
prmt.b32 high, p, q, side;
prmt.b32 first, low, high, 0x5140;
prmt.b32 second, low, high, 0x7362;
mov.b32 {u, v}, first;
cvt.f32.f16 f, u;
fma.rn.f32 s, f, $7, s;
cvt.f32.f16 f, v;
fma.rn.f32 s, f, $6, s;
mov.b32 {u, v}, second;
cvt.f32.f16 f, u;
fma.rn.f32 s, f, $9, s;
cvt.f32.f16 f, v;
fma.rn.f32 s, f, $8, s;
mov.f32 $0, s;
}
""")


@triton.jit
def word_sum(
    word, x0, x1, x2, x3, x4, x5, x6, x7, table, low0, low1, low2, low3, high0, high1, high2, high3,
    IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """The sum of each word's values times their inputs."""
    if IN_REGISTERS:
        return tl.inline_asm_elementwise(
            WORD_SUM, '=f,r,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r',
            [word, x0, x1, x2, x3, x4, x5, x6, x7, low0, low1, low2, low3, high0, high1, high2, high3],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    acc = tl.load(table + ((word >> 4) & 15)) * x0 + tl.load(table + (word & 15)) * x1
    acc += tl.load(table + ((word >> 12) & 15)) * x2 + tl.load(table + ((word >> 8) & 15)) * x3
    acc += tl.load(table + ((word >> 20) & 15)) * x4 + tl.load(table + ((word >> 16) & 15)) * x5
    return acc + tl.load(table + ((word >> 28) & 15)) * x6 + tl.load(table + ((word >> 24) & 15)) * x7


@triton.jit
def plane_offset(index, size, PLANES: tl.constexpr):
    """The offset of a vector's entry in plane layout."""
    return (index % PLANES) * (size // PLANES) + index // PLANES


@triton.jit
def load_plane(x, offset, inside, size, NUMBER: tl.constexpr):
    """Loads the inputs of words that are in one plane."""
    return tl.load(x + NUMBER * (size // 8) + offset, mask=inside, other=0.0)


def to_planes(x: Tensor, planes: int) -> Tensor:
    """Converts the last dimension of a tensor to plane layout."""
    return x if planes == 1 else x.unflatten(-1, (-1, planes)).transpose(-1, -2).flatten(-2)
