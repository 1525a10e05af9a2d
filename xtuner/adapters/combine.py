"""Combines the changes of several adapters: `W + sum of weight_i * (adapter_i(W) - W)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from xtuner.adapters.delta import Delta, LoraDelta, Rows
from xtuner.adapters.file import AdapterFile
from xtuner.errors import CheckpointError


@dataclass(frozen=True)
class Weighted:
    """An adapter and the factor of its change; 1 is the full change."""

    adapter: AdapterFile
    weight: float = 1.0


@dataclass(frozen=True)
class Combined:
    """All changes of one tensor.

    Attributes:
        deltas: Each adapter's change and its weight.
    """

    deltas: tuple[tuple[Delta, float], ...]

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """Returns rows of the changed tensor.

        Args:
            base: float32, the same rows of the base's tensor; may be overwritten.
            start: First row.
            stop: Row after the last.
        """
        if len(self.deltas) == 1 and self.deltas[0][1] == 1:
            return self.deltas[0][0].rows(base, start, stop)
        low_rank = [(d, w) for d, w in self.deltas if isinstance(d, LoraDelta) and d.factor is None]
        others = [(d, w) for d, w in self.deltas if not (isinstance(d, LoraDelta) and d.factor is None)]
        total = base.clone() if others else base
        for delta, weight in others:
            total.add_(delta.rows(base.clone(), start, stop).sub_(base), alpha=weight)
        for delta, weight in low_rank:
            total = replace(delta, scale=delta.scale * weight).rows(total, start, stop)
        return total


def combine(parts: Sequence[Weighted], target: str, weight: Rows, shape: tuple[int, ...]) -> Combined:
    """Combines the changes that adapters make to one tensor.

    Args:
        parts: The adapters.
        target: The tensor's name.
        weight: Opens the base's rows, float32.
        shape: The shape returned by `merged_shape`.
    """
    changing = [part for part in parts if target in part.adapter.targets]
    return Combined(tuple((part.adapter.delta(target, weight, shape), part.weight) for part in changing))


def merged_shape(parts: Sequence[Weighted], target: str, base: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a merged tensor: the base's, unless a single adapter resizes it.

    Raises:
        CheckpointError: An adapter does not fit the base, or several adapters change a tensor that one has resized.
    """
    changing = [part for part in parts if target in part.adapter.targets]
    shapes = {part.adapter.shape(target, base) for part in changing}
    if shapes <= {base}:
        return base
    if len(changing) > 1 or changing[0].weight != 1:
        raise CheckpointError(
            f'{changing[0].adapter.folder}: {target} has a different shape than in the base ({shapes}, {base}), so it '
            'cannot be weighted or summed; merge this adapter alone, with weight 1'
        )
    return shapes.pop()
