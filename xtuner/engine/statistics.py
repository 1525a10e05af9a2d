"""What an objective needs of a whole optimizer step, or of the validation set, before its loss: sums over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from xtuner.errors import TrainingError


@torch.no_grad()
def sum_statistics(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    autocast: Callable[[], torch.autocast],
    over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, Tensor] | None:
    """Adds up `Objective.statistics` of micro-batches, in float64; every rank calls it.

    Args:
        model: A `TrainingModel`.
        batches: This rank's micro-batches, at least one.
        autocast: The context that a forward pass runs in.
        over_ranks: Sums a tensor over the ranks.

    Returns:
        By name; None where the objective has no statistics.

    Raises:
        TrainingError: the objective's method does not return tensors by name, or others than for the batch before.
    """
    if model.objective.statistics is None:
        return None
    total: dict[str, Tensor] = {}
    for batch in batches:
        with autocast():
            found = model(**batch, only_statistics=True)
        wrong = not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values())
        if wrong or (total and set(found) != set(total)):
            raise TrainingError(
                f'objective {model.objective.name}: `statistics` must return tensors under the same names for '
                f'every micro-batch, got {list(found) if isinstance(found, Mapping) else type(found).__name__}'
            )
        total = {name: total.get(name, 0) + found[name].detach().double() for name in sorted(found)}
    if not total:
        return {}
    flat = over_ranks(torch.cat([value.reshape(-1) for value in total.values()]))
    parts = flat.split([value.numel() for value in total.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(total.items(), parts, strict=True)}
