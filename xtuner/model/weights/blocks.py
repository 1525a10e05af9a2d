"""Blocks of rows by which a weight is read, computed and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

BLOCK_ELEMENTS = 2**18  # 1 MB in float32, which fits into a core's cache and the C library's heap
_ROWS_AT_ONCE = 16  # multiples of these rows make matrix products bit-equal to the product of the whole matrix


def row_blocks(shape: Sequence[int], elements: int | None = None) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows of about `elements` elements, default `BLOCK_ELEMENTS`; a scalar counts as one row."""
    num_rows = shape[0] if shape else 1
    step = max(1, (elements or BLOCK_ELEMENTS) // max(1, math.prod(shape[1:])))
    step -= step % _ROWS_AT_ONCE if step > _ROWS_AT_ONCE else 0
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
