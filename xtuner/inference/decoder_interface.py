"""The interface between the decoding thread and what runs the model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from torch import Tensor


class Decoder(Protocol):
    """What the thread needs of `xtuner.inference.batching.BatchDecoder`."""

    num_rows: int

    def prefill(self, ids: Sequence[Sequence[int]], *, row: int, start: int = 0) -> Tensor:
        """Reads prompts."""

    def step(
        self, ids: Sequence[int], lengths: Sequence[int], *, row: int, alone: bool = False, key: Hashable = None
    ) -> Tensor:
        """Reads one more token of each."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a row."""
