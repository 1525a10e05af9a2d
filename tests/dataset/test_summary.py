"""What became of the records, in words."""

from __future__ import annotations

import pytest

from xtuner.dataset.summary import Summary

pytestmark = pytest.mark.unit


def test_one_record_is_not_many():
    assert Summary(1, 1, 1, 1200, 1).lines() == [
        '1 record, 1 conversation, 1 kept (0 of them truncated), 0 dropped; 1,200 tokens, 1 of them trained'
    ]
