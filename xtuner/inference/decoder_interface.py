"""The interface of the scheduler to the model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from torch import Tensor


class SlotDecoder(Protocol):
    """A decoder of sequences in slots; `xtuner.inference.batching.BatchDecoder` implements it."""

    num_slots: int

    def prefill(self, ids: Sequence[Sequence[int]], *, slot: int, start: int = 0) -> Tensor:
        """Processes prompts, or chunks of them, in consecutive slots."""

    def step(
        self, ids: Sequence[int], lengths: Sequence[int], *, slot: int, exclusive: bool = False, key: Hashable = None
    ) -> Tensor:
        """Runs one decode step for consecutive slots."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the KV cache of a slot to another slot."""
