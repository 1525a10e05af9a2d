"""Assigns the slots of the KV cache to answers.

Answers of the same adapter occupy consecutive slots, because they share a forward pass, without gaps in between:

    slot    0  1  2  3  4  5  6  7
    adapter a  a  a  b  b  c  .  .

Adding or removing an answer costs at most one move for each adapter after it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

T = TypeVar('T')


class SlotTable(Generic[T]):
    """Slots and their answers.

    Args:
        groups: The adapters, in the order of their slots.
        move: Called with (source slot, target slot, answer) when an answer moves to another slot.
    """

    def __init__(self, groups: Sequence[Hashable], move: Callable[[int, int, T], None]) -> None:
        self._groups: dict[Hashable, list[T]] = {group: [] for group in groups}
        self._move = move

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def items(self) -> list[tuple[Hashable, T]]:
        """All answers with their adapters, in the order of their slots."""
        return [(group, item) for group, held in self._groups.items() for item in held]

    def group(self, group: Hashable) -> tuple[int, list[T]]:
        """The first slot of an adapter, and its answers in the order of their slots."""
        return self._first_slot(group), list(self._groups[group])

    def slot(self, group: Hashable, item: T) -> int:
        """The slot of an answer."""
        return self._first_slot(group) + self._groups[group].index(item)

    def add(self, group: Hashable, item: T) -> int:
        """Assigns the slot after the other answers of an adapter; returns it."""
        for later in reversed(self._groups_after(group)):
            held, first = self._groups[later], self._first_slot(later)
            if held:
                self._move(first, first + len(held), held[0])
                held.append(held.pop(0))
        self._groups[group].append(item)
        return self._first_slot(group) + len(self._groups[group]) - 1

    def remove(self, group: Hashable, item: T) -> None:
        """Frees the slot of an answer. If a move raises, all other answers stay in the table."""
        held, first = self._groups[group], self._first_slot(group)
        at = held.index(item)
        hole = first + len(held) - 1
        if at < len(held) - 1:
            self._move(hole, first + at, held[-1])
            held[at] = held[-1]
        held.pop()
        for later in self._groups_after(group):
            held = self._groups[later]
            if held:
                self._move(hole + len(held), hole, held[-1])
                held.insert(0, held.pop())
                hole += len(held)

    def clear(self) -> None:
        """Frees all slots without moves."""
        for held in self._groups.values():
            held.clear()

    def _first_slot(self, group: Hashable) -> int:
        names = list(self._groups)
        return sum(len(self._groups[name]) for name in names[: names.index(group)])

    def _groups_after(self, group: Hashable) -> list[Hashable]:
        names = list(self._groups)
        return names[names.index(group) + 1 :]
