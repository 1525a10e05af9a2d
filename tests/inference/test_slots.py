"""Slots: after any additions and removals, groups stay consecutive and the KV cache is moved along."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtuner.inference.slots import SlotTable

pytestmark = pytest.mark.unit

ROWS, GROUPS = 6, 'abc'


@given(st.lists(st.tuples(st.sampled_from(GROUPS), st.integers(0, 99)), max_size=60))
def test_any_order_of_joining_and_leaving(steps: list[tuple[str, int]]) -> None:
    store: list[object] = [None] * ROWS
    moves = 0

    def move(source: int, target: int, item: object) -> None:
        nonlocal moves
        moves += 1
        assert store[source] is item
        store[target] = item

    table: SlotTable[object] = SlotTable(GROUPS, move)
    held: list[tuple[str, object]] = []
    for group, choice in steps:
        moves = 0
        if held and (choice % 2 or len(held) == ROWS):
            table.remove(*held.pop(choice % len(held)))
        else:
            item = object()
            slot = table.add(group, item)
            assert (
                store[slot] not in [other for _, other in held] or store[slot] is None or store.count(store[slot]) > 1
            )
            store[slot] = item
            held.append((group, item))
        assert moves <= len(GROUPS)
        assert len(table) == len(held)
        assert {id(item) for _, item in table.items()} == {id(item) for _, item in held}
        slot = 0
        for name in GROUPS:
            first, items = table.group(name)
            assert first == slot
            assert [store[first + n] for n in range(len(items))] == items
            assert [table.slot(name, item) for item in items] == list(range(first, first + len(items)))
            slot += len(items)


@given(st.lists(st.tuples(st.sampled_from(GROUPS), st.integers(0, 99)), min_size=1, max_size=30), st.integers(0, 5))
def test_a_move_that_raises_loses_no_answer(steps: list[tuple[str, int]], good_moves: int) -> None:
    """All answers must still be in the table, so that they can be ended."""
    left = [good_moves]

    def move(source: int, target: int, item: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError

    table: SlotTable[object] = SlotTable(GROUPS, move)
    held: list[tuple[str, object]] = []
    for group, choice in steps:
        going = held.pop(choice % len(held)) if held and (choice % 2 or len(held) == ROWS) else None
        coming = None if going else (group, object())
        try:
            table.remove(*going) if going else table.add(*coming)
        except RuntimeError:
            assert {item for _, item in held} <= {item for _, item in table.items()}
            return
        held += [coming] if coming else []
