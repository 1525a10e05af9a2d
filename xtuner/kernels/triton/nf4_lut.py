"""4-bit weights, eight to a word of 32 bits, as Triton's kernels turn them into floats.

On a GPU their values are picked by byte permutations out of the table as float16, 5 instructions a weight where reading
the table from memory takes 11. The table is in [-1, 1]: what float16 rounds off is an eighth of what bfloat16 would.

So that a thread finds the inputs of its words side by side, the input of 4-bit weights lies in eight planes: the first
inputs of all words, the second ones, and so on.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 8  # 4-bit weights in a word, and planes of their input
IN_REGISTERS = os.environ.get('TRITON_INTERPRET') != '1'  # the interpreter knows no assembly: the table is read there


def table_words(table: Tensor) -> tuple[int, ...]:
    """The table's values as float16: their low bytes four to a word, then their high bytes."""
    halves = table.detach().cpu().half().view(torch.uint8).view(16, 2)
    return tuple(halves.t().contiguous().view(torch.int32).reshape(-1).tolist())


# The sum of a word's eight values times their inputs. $0: the sum; $1: the word; $2 to $9: the inputs; $10 to $13 and
# $14 to $17: the table's low and high bytes. A permutation picks bytes by the low three bits of each code out of eight;
# the fourth bit picks between the two halves of the table. A byte's high code comes first.
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
    """The sum of words' values times their inputs."""
    if IN_REGISTERS:
        return tl.inline_asm_elementwise(
            WORD_SUM, '=f,r,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r',
            [word, x0, x1, x2, x3, x4, x5, x6, x7, low0, low1, low2, low3, high0, high1, high2, high3],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    total = tl.load(table + ((word >> 4) & 15)) * x0 + tl.load(table + (word & 15)) * x1
    total += tl.load(table + ((word >> 12) & 15)) * x2 + tl.load(table + ((word >> 8) & 15)) * x3
    total += tl.load(table + ((word >> 20) & 15)) * x4 + tl.load(table + ((word >> 16) & 15)) * x5
    return total + tl.load(table + ((word >> 28) & 15)) * x6 + tl.load(table + ((word >> 24) & 15)) * x7


@triton.jit
def place(index, size, PLANES: tl.constexpr):
    """Where an entry of a vector lies in planes."""
    return (index % PLANES) * (size // PLANES) + index // PLANES


@triton.jit
def plane(x, place, inside, size, NUMBER: tl.constexpr):
    """A plane's inputs of words."""
    return tl.load(x + NUMBER * (size // 8) + place, mask=inside, other=0.0)


def in_planes(x: Tensor, planes: int) -> Tensor:
    """The order in which a vector's entries, the last dimension, lie in planes."""
    return x if planes == 1 else x.unflatten(-1, (-1, planes)).transpose(-1, -2).flatten(-2)
