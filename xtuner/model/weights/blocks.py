"""Ranges of rows in which a weight is read, computed and written, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

BLOCK_ELEMENTS = 2**18  # of a block: 1 MB in float32, which stays in a core's own cache and in the C library's heap
_ROWS_AT_ONCE = 16  # a multiple of these: products of matrices then have the bits of the whole matrix's product


def row_blocks(shape: Sequence[int], elements: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about so many elements, `BLOCK_ELEMENTS` by default; without dimensions it is one row."""
    num_rows = shape[0] if shape else 1
    step = max(1, (elements or BLOCK_ELEMENTS) // max(1, math.prod(shape[1:])))
    step -= step % _ROWS_AT_ONCE if step > _ROWS_AT_ONCE else 0
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
