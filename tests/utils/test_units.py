"""Quantities as text."""

from __future__ import annotations

import pytest

from xtuner.utils.units import clock, compact, counted, duration, gib, gigabytes

pytestmark = pytest.mark.unit


def test_memory_is_binary_and_files_are_decimal() -> None:
    assert [gib(n) for n in (84 * 2**20, 2**30 // 10 + 1, 3 * 2**29)] == ['84 MiB', '0.10 GiB', '1.50 GiB']
    assert [gigabytes(n) for n in (8_400_000, 10**9 - 1, 14_600_000_000)] == ['8.4 MB', '1000.0 MB', '14.6 GB']


def test_counts() -> None:
    assert [compact(n) for n in (950, 12_345, 1_234_567, 2.5e9)] == ['950', '12.3 k', '1.23 M', '2.5 B']
    assert [counted(n, 'pack') for n in (0, 1, 2000)] == ['0 packs', '1 pack', '2,000 packs']


def test_durations() -> None:
    expected = ['9.9 s', '59.9 s', '1 min 00 s', '3 min 20 s', '21 min', '2 h 05 min']
    assert [duration(s) for s in (9.87, 59.9, 59.96, 200, 1_300, 7_500)] == expected
    assert [clock(s) for s in (9, 3723, 90_000)] == ['0:00:09', '1:02:03', '25:00:00']
