"""What a step must have: a batch, something to learn in each of its items, and a gradient for each adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from xtuner.adapters.attach import trainable_parameters
from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX
from xtuner.errors import DataError, TrainingError

logger = logging.getLogger('xtuner')

_MOST_NAMED = 3
_EXPERT = re.compile(r'(.*\bexperts)\.\d+\.')


def next_batch(batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The next micro-batch.

    Raises:
        DataError: a record is wrong, in the words of the process that read it.
    """
    try:
        return next(batches)
    except DataError as error:
        lines = str(error).strip().splitlines()  # a worker's error comes with its traceback; its own words come last
        raise DataError(lines[-1].split(': ', 1)[-1] if len(lines) > 1 else lines[0]) from error


def is_dead_worker(error: Exception) -> bool:
    """Whether an error says that a process that reads batches has died."""
    return isinstance(error, RuntimeError) and str(error).startswith('DataLoader worker')


def dead_worker_message(error: Exception) -> str:
    """What to say of it."""
    reason = str(error).splitlines()[0].rstrip('. ')
    return (
        f'a process that reads batches died ({reason}); --resume goes on from the last checkpoint, and '
        'runtime.num_workers=0 reads without such processes'
    )


def check_targets(labels: Tensor, step: int, rows: Callable[[], Sequence[str]]) -> None:
    """Looks for a row without anything to learn.

    Args:
        labels: int64 (B, S).
        step: Steps done.
        rows: Names the rows.

    Raises:
        TrainingError: there is one; names it.
    """
    empty = ((labels[:, 1:] != IGNORE_INDEX).sum(1) == 0).nonzero().flatten().tolist()
    if not empty:
        return
    names = rows()
    named = ', '.join(names[row] for row in empty[:_MOST_NAMED]) if names else f'row {empty[0] + 1} of a micro-batch'
    raise TrainingError(f'step {step + 1} has no target token in {named}; see `xtuner log-dataset` for what is trained')


def check_gradients(model: nn.Module, step: int) -> None:
    """Looks, after a backward pass, for adapters (or single parameters) that learn nothing.

    A new LoRA's first factor has a gradient of zero, since the second factor is zero: an adapter counts as a whole.
    An expert whose neighbours learn is only told: no token of the step was routed to it.

    Raises:
        TrainingError: there is one; names it.
    """
    learns = _learning(model)
    taught = {_experts_of(name) for name, learnt in learns.items() if learnt}
    idle = [name for name, learnt in learns.items() if not learnt]
    unreached = [name for name in idle if _experts_of(name) and _experts_of(name) in taught]
    if unreached:
        logger.info(
            'step %d: no token reached %d adapters of experts (%s ...); they learn once one does',
            step + 1, len(unreached), unreached[0],
        )  # fmt: skip
        idle = [name for name in idle if name not in set(unreached)]
    if idle:
        more = f' and {len(idle) - _MOST_NAMED} more' if len(idle) > _MOST_NAMED else ''
        raise TrainingError(
            f'step {step + 1} gave no gradient to {", ".join(idle[:_MOST_NAMED])}{more}: the loss does not depend on '
            'it; leave it out of adapter.target_modules'
        )


def _experts_of(name: str) -> str:
    """The group of experts that a module belongs to, such as 'layers.3.mlp.experts'; '' where it is no expert."""
    found = _EXPERT.match(name)
    return found[1] if found else ''


def _learning(model: nn.Module) -> dict[str, bool]:
    """By module with an adapter, or single parameter: whether one of its parameters has a gradient other than zero."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    learns: dict[str, bool] = {}
    for name, parameter in trainable_parameters(model).items():
        owner = _owner(name, adapted)
        has_gradient = parameter.grad is not None and bool(_whole(parameter.grad).any())
        learns[owner] = learns.get(owner, False) or has_gradient
    return learns


def _whole(gradient: Any) -> Tensor:
    """A gradient that may be spread over ranks; all of them ask for it."""
    return gradient.full_tensor() if hasattr(gradient, 'full_tensor') else gradient


def _owner(name: str, adapted: set[str]) -> str:
    """The adapted module that a parameter belongs to, or its own name."""
    parts = name.split('.')
    return next((prefix for end in range(len(parts)) if (prefix := '.'.join(parts[:end])) in adapted), name)
