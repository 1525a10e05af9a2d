"""The sum of what several adapters change: `W + sum of weight_i * (adapter_i(W) - W)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from xtuner.adapters.delta import Delta, LoraDelta, Rows
from xtuner.adapters.file import AdapterFile
from xtuner.errors import CheckpointError


@dataclass(frozen=True)
class Weighted:
    """An adapter and how much of its change is taken; 1 is all of it."""

    adapter: AdapterFile
    weight: float = 1.0


@dataclass(frozen=True)
class Combined:
    """All changes of one tensor.

    Attributes:
        deltas: What each adapter does to it, and its weight.
    """

    deltas: tuple[tuple[Delta, float], ...]

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """The changed rows.

        Args:
            base: float32, these rows of the base's tensor; may be written over.
            start: The first of the rows.
            stop: The row after the last.
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
    """All that the adapters do to one tensor.

    Args:
        parts: The adapters.
        target: The tensor's name.
        weight: Its rows in the base, float32.
        shape: Its shape, as `merged_shape` says.
    """
    own = [part for part in parts if target in part.adapter.targets]
    return Combined(tuple((part.adapter.delta(target, weight, shape), part.weight) for part in own))


def merged_shape(parts: Sequence[Weighted], target: str, base: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a merged tensor: the base's, unless one adapter alone brings it in another size.

    Raises:
        CheckpointError: an adapter does not fit the base, or several change a tensor that one has resized.
    """
    own = [part for part in parts if target in part.adapter.targets]
    shapes = {part.adapter.shape(target, base) for part in own}
    if shapes <= {base}:
        return base
    if len(own) > 1 or own[0].weight != 1:
        raise CheckpointError(
            f'{own[0].adapter.folder}: {target} has another size than in the base ({shapes} and {base}), so it cannot '
            'be weighted or added to; merge this adapter alone, with weight 1'
        )
    return shapes.pop()
