"""What an adapter does to one of the base's tensors, computed a block of rows at a time.

Letters: O outputs, I inputs, r rank; a linear layer's weight is (O, I), an embedding's (words, width).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Rows = Callable[[int, int], Tensor]
"""Gives rows `start` to `stop` of a tensor, in memory of their own."""


class Delta(Protocol):
    """One adapter's effect on one tensor."""

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the changed tensor.

        Args:
            base: float32, these rows of the base's tensor; may be written over.
            start: The first of the rows.
            stop: The row after the last.

        Returns:
            float32 (stop - start, ...).
        """
        ...


@dataclass(frozen=True)
class LoraDelta:
    """LoRA: `W + scale * up @ down` (arXiv:2106.09685).

    Attributes:
        up: float32, one row for each row of the weight, (O, r): lora_B of a linear layer. Where the weight stands
            transposed (an embedding, a Conv1D), lora_A's transpose.
        down: float32 (r, I): lora_A, or lora_B's transpose.
        scale: alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv:2312.03732).
        factor: DoRA's magnitude over the norm of each output's weights (arXiv:2402.09353): (O, 1), or (1, I) where
            the weight stands transposed; None for plain LoRA.
    """

    up: Tensor
    down: Tensor
    scale: float
    factor: Tensor | None = None

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """As `Delta.rows`."""
        merged = base.addmm_(self.up[start:stop], self.down, alpha=self.scale)
        if self.factor is None:
            return merged
        return merged.mul_(self.factor if self.factor.shape[0] == 1 else self.factor[start:stop])

    def with_magnitude(
        self, magnitude: Tensor, weight: Rows, blocks: Iterable[tuple[int, int]], *, by_row: bool
    ) -> LoraDelta:
        """The same as a DoRA.

        Args:
            magnitude: float32, one number an output.
            weight: The base's weight in float32; it is read once more for the norms.
            blocks: Ranges of rows that cover it.
            by_row: Whether an output is a row of the weight, else a column.
        """
        squares = []
        for start, stop in blocks:
            squares.append(self.rows(weight(start, stop), start, stop).double().square_().sum(1 if by_row else 0))
        norms = (torch.cat(squares) if by_row else torch.stack(squares).sum(0)).sqrt()
        factor = (magnitude.double() / norms).float()
        return LoraDelta(self.up, self.down, self.scale, factor[:, None] if by_row else factor[None])


@dataclass(frozen=True)
class Replaced:
    """A tensor that was trained whole, and perhaps resized: `modules_to_save`, and biases."""

    values: Rows

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """As `Delta.rows`."""
        return self.values(start, stop)


@dataclass(frozen=True)
class BiasDelta:
    """A bias of lora_B, which adds to the layer's: `b + scale * lora_B.bias`."""

    bias: Tensor
    scale: float

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """As `Delta.rows`."""
        return base.add_(self.bias[start:stop], alpha=self.scale)


@dataclass(frozen=True)
class TokenDelta:
    """Single trained rows of an embedding: their numbers, int64 (n,), and their values, float32 (n, width)."""

    indices: Tensor
    values: Tensor

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """As `Delta.rows`."""
        here = (self.indices >= start) & (self.indices < stop)
        base[self.indices[here] - start] = self.values[here]
        return base
