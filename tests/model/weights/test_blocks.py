"""In which blocks a tensor is walked through."""

from __future__ import annotations

import pytest

from xtuner.model.weights.blocks import row_blocks

pytestmark = pytest.mark.unit


@pytest.mark.parametrize('shape', [(1000, 3000), (37, 2**18), (5, 3), (0, 8), (40, 7000), (999_999,), (12, 0)])
def test_blocks_are_all_rows_in_order(shape: tuple[int, ...]) -> None:
    blocks = list(row_blocks(shape, 2**18))
    assert [row for block in blocks for row in range(*block)] == list(range(shape[0]))
    width = shape[1] if len(shape) > 1 else 1
    assert all(stop - start == 1 or (stop - start) * width <= 2**18 for start, stop in blocks)
    if 16 * width <= 2**18:  # products of such blocks have the bits of the whole product
        assert all(start % 16 == 0 for start, _ in blocks)


def test_a_number_is_one_row() -> None:
    assert list(row_blocks(())) == [(0, 1)]
