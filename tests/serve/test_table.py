"""Rows: whatever joins and leaves, neighbours stay together and what is in the store follows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xtuner.serve.table import Table

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

    table: Table[object] = Table(GROUPS, move)
    held: list[tuple[str, object]] = []
    for group, choice in steps:
        moves = 0
        if held and (choice % 2 or len(held) == ROWS):
            table.remove(*held.pop(choice % len(held)))
        else:
            item = object()
            row = table.add(group, item)
            assert store[row] not in [other for _, other in held] or store[row] is None or store.count(store[row]) > 1
            store[row] = item
            held.append((group, item))
        assert moves <= len(GROUPS)
        assert len(table) == len(held)
        assert {id(item) for _, item in table.items()} == {id(item) for _, item in held}
        row = 0
        for name in GROUPS:
            first, items = table.group(name)
            assert first == row
            assert [store[first + n] for n in range(len(items))] == items
            assert [table.row(name, item) for item in items] == list(range(first, first + len(items)))
            row += len(items)
