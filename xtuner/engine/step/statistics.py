"""Sums over a whole optimizer step and all ranks: the statistics that an objective's loss needs, and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import all_gather_object
from torch import Tensor

from xtuner.engine.distributed.base import Strategy
from xtuner.engine.step.result import RESERVED
from xtuner.errors import TrainingError
from xtuner.objectives.base import has_statistics


@torch.no_grad()
def sum_statistics(
    model: Any,
    batches: Iterable[tuple[Mapping[str, Tensor], bool]],
    *,
    autocast: Callable[[], torch.autocast],
    over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, Tensor] | None:
    """Adds up `Objective.statistics` of micro-batches, in float64; every rank calls it.

    Args:
        model: A `TrainingModel`.
        batches: This rank's micro-batches, at least one, and whether each counts: one that does not is computed because
            other ranks, which hold parts of the weights, compute theirs.
        autocast: The context that a forward pass runs in.
        over_ranks: Sums a tensor over the ranks.

    Returns:
        By name; None where the objective has no statistics.

    Raises:
        TrainingError: the objective's method does not return tensors by name, or others than for the batch before.
    """
    if not has_statistics(model.objective):
        return None
    total: dict[str, Tensor] = {}
    for batch, counted in batches:
        with autocast():
            found = model(**batch, only_statistics=True)
        wrong = not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values())
        if wrong or (total and set(found) != set(total)):
            raise TrainingError(
                f'objective {model.objective.name}: `statistics` must return tensors under the same names for '
                f'every micro-batch, got {list(found) if isinstance(found, Mapping) else type(found).__name__}'
            )
        part = {name: found[name].detach().double() for name in sorted(found)}
        part = part if counted else {name: torch.zeros_like(value) for name, value in part.items()}
        total = {name: total.get(name, 0) + value for name, value in part.items()}
    if not total:
        return {}
    flat = over_ranks(torch.cat([value.reshape(-1) for value in total.values()]))
    parts = flat.split([value.numel() for value in total.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(total.items(), parts, strict=True)}


class MetricMeans:
    """Divides each metric's sum over a step and all ranks by the step's weight.

    Args:
        strategy: Holds the model; tells how many ranks there are.
        over_ranks: Sums a tensor over the ranks.
    """

    def __init__(self, strategy: Strategy, over_ranks: Callable[[Tensor], Tensor]) -> None:
        self._strategy, self._over_ranks = strategy, over_ranks
        self._names: list[str] | None = None

    def of_step(self, step: int, parts: Sequence[Mapping[str, Tensor]], weight: float) -> dict[str, float]:
        """The means of a step by name, in the names' order; every rank calls it.

        Args:
            step: Steps done before.
            parts: `TrainingModel.metrics` of each of this rank's micro-batches.
            weight: Of the step, over all ranks.

        Raises:
            TrainingError: a name that each step's line has anyway, or names that differ between micro-batches or ranks.
        """
        names = self._checked([sorted(part) for part in parts], step)
        if not names:
            return {}
        sums = torch.stack([torch.stack([part[name] for name in names]) for part in parts]).sum(0)
        return {name: value / weight for name, value in zip(names, self._over_ranks(sums).tolist(), strict=True)}

    def _checked(self, every: list[list[str]], step: int) -> list[str]:
        names = every[0]
        if self._names is None:  # in the first step all ranks compare: a sum over ranks needs the same names on each
            every = every + (all_gather_object(names) if self._strategy.world_size > 1 else [])
            self._names = names
        where = f'step {step + 1}: objective {self._strategy.bare.objective.name} returns metrics named'
        if taken := sorted(RESERVED.intersection(names)):
            raise TrainingError(f'{where} {taken}, as numbers that every step has; rename them')
        for other in (*every, self._names):
            if other != names:
                raise TrainingError(f'{where} {names} and {other}; names must be the same in every micro-batch')
        return names
