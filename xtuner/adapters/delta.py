"""Changes that an adapter makes to a tensor of the base, computed by blocks of rows.

Shape letters: O outputs, I inputs, r rank; a linear layer's weight is (O, I), an embedding's (tokens, width).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Rows = Callable[[int, int], Tensor]
"""Returns rows `start` to `stop` of a tensor, as a copy."""


class Delta(Protocol):
    """The change that one adapter makes to one tensor."""

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """Returns rows `start` to `stop` of the changed tensor.

        Args:
            base: float32, the same rows of the base's tensor; may be overwritten.
            start: First row.
            stop: Row after the last.

        Returns:
            float32 (stop - start, ...).
        """
        ...


@dataclass(frozen=True)
class LoraDelta:
    """LoRA: `W + scale * b @ a` (arXiv:2106.09685).

    Attributes:
        b: float32 (O, r), one row for each row of the weight: lora_B of a linear layer, or lora_A's transpose if the
            weight is stored transposed (an embedding, a Conv1D).
        a: float32 (r, I): lora_A, or lora_B's transpose.
        scale: alpha / r, or alpha / sqrt(r) with rank stabilization (arXiv:2312.03732).
        factor: DoRA's magnitude divided by the norm of each output's weights (arXiv:2402.09353): (O, 1), or (1, I) if
            the weight is stored transposed; None for plain LoRA.
    """

    b: Tensor
    a: Tensor
    scale: float
    factor: Tensor | None = None

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """See `Delta.rows`."""
        merged = base.addmm_(self.b[start:stop], self.a, alpha=self.scale)
        if self.factor is None:
            return merged
        return merged.mul_(self.factor if self.factor.shape[0] == 1 else self.factor[start:stop])

    def with_magnitude(
        self, magnitude: Tensor, weight: Rows, blocks: Iterable[tuple[int, int]], *, by_row: bool
    ) -> LoraDelta:
        """Returns the same change as DoRA.

        Args:
            magnitude: float32, one number per output.
            weight: Opens the base's weight in float32; it is read once for the norms.
            blocks: Ranges of rows that cover the weight.
            by_row: Whether an output is a row of the weight; otherwise a column.
        """
        squares = []
        for start, stop in blocks:
            squares.append(self.rows(weight(start, stop), start, stop).double().square_().sum(1 if by_row else 0))
        norms = (torch.cat(squares) if by_row else torch.stack(squares).sum(0)).sqrt()
        factor = (magnitude.double() / norms).float()
        return LoraDelta(self.b, self.a, self.scale, factor[:, None] if by_row else factor[None])


@dataclass(frozen=True)
class Replaced:
    """A tensor that was trained as a whole and possibly resized: `modules_to_save`, and biases."""

    values: Rows

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """See `Delta.rows`."""
        return self.values(start, stop)


@dataclass(frozen=True)
class BiasDelta:
    """The bias of lora_B, added to the layer's: `b + scale * lora_B.bias`."""

    bias: Tensor
    scale: float

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """See `Delta.rows`."""
        return base.add_(self.bias[start:stop], alpha=self.scale)


@dataclass(frozen=True)
class TokenDelta:
    """Single trained rows of an embedding: row numbers, int64 (n,), and values, float32 (n, width)."""

    indices: Tensor
    values: Tensor

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """See `Delta.rows`."""
        inside = (self.indices >= start) & (self.indices < stop)
        base[self.indices[inside] - start] = self.values[inside]
        return base
