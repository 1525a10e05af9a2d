"""Applying a map function to a record."""

from __future__ import annotations

import pytest

from xtuner.dataset.mapping.map_records import apply_map_fn
from xtuner.dataset.sources.readers import Record
from xtuner.errors import DataError

pytestmark = pytest.mark.unit


def test_what_a_map_function_raises_is_named_with_the_records_columns():
    with pytest.raises(DataError, match=r'f:2: `<lambda>` failed with ZeroDivisionError: .* has the columns x'):
        apply_map_fn(lambda example: 1 / 0, Record('f:2', {'x': 1}))
    with pytest.raises(DataError, match='f:2: a record must be a dict, got str'):
        apply_map_fn(lambda example: {}, Record('f:2', 'text'))


@pytest.mark.parametrize('left_out', [None, {'conversation': []}, []])
def test_a_map_function_may_leave_a_record_out(left_out):
    assert apply_map_fn(lambda example: left_out, Record('f:2', {'x': 1})) == []
