"""Tensors that are made anew when they are asked for again too late."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor


class LastUsed:
    """The tensors that were used last, up to so many bytes of them; the newest always."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._held = most_bytes, 0
        self._tensors: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._tensors)

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of a key: what `make` returned for it before, where that is still here."""
        found = self._tensors.pop(key, None)
        if found is None:
            found = make()
            self._held += found.nbytes
        self._tensors[key] = found  # behind all others
        while self._held > self._most and len(self._tensors) > 1:
            self._held -= self._tensors.pop(next(iter(self._tensors))).nbytes
        return found
