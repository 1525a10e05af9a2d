"""Least-recently-used cache of tensors that can be recomputed."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor


class LRUTensors:
    """Keeps the most recently used tensors within a byte limit; always keeps the newest."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._tensors: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        """Number of cached tensors."""
        return len(self._tensors)

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Returns the cached tensor of a key, or caches and returns the result of `make`."""
        tensor = self._tensors.pop(key, None)
        if tensor is None:
            tensor = make()
            self._num_bytes += tensor.nbytes
        self._tensors[key] = tensor  # moves it to the end, as the most recently used
        while self._num_bytes > self._max_bytes and len(self._tensors) > 1:
            self._num_bytes -= self._tensors.pop(next(iter(self._tensors))).nbytes
        return tensor
