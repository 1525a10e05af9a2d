"""Checks of a training step: its batch, targets in every item, and a gradient for every adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from xtuner.adapters.attach import trainable_parameters
from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX
from xtuner.errors import DataError, TrainingError, first_few

logger = logging.getLogger('xtuner')

_MAX_NAMED = 3
_EXPERT = re.compile(r'(.*\bexperts)\.\d+\.')


def next_batch(batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the next micro-batch.

    Raises:
        DataError: A record is wrong; the message is the reading process's.
    """
    try:
        return next(batches)
    except DataError as error:
        lines = str(error).strip().splitlines()  # a worker's error includes its traceback; the message comes last
        raise DataError(lines[-1].split(': ', 1)[-1] if len(lines) > 1 else lines[0]) from error


def is_dead_worker(error: Exception) -> bool:
    """Whether an error means that a DataLoader worker has died."""
    return isinstance(error, RuntimeError) and str(error).startswith('DataLoader worker')


def dead_worker_message(error: Exception) -> str:
    """The message for a dead DataLoader worker."""
    reason = str(error).splitlines()[0].rstrip('. ')
    return (
        f'a DataLoader worker died ({reason}); --resume continues from the last checkpoint, and '
        'runtime.num_workers=0 reads without workers'
    )


def check_targets(labels: Tensor, step: int, rows: Callable[[], Sequence[str]]) -> None:
    """Checks that every row has a target token.

    Args:
        labels: int64 (B, S).
        step: Completed steps.
        rows: Returns descriptions of the rows.

    Raises:
        TrainingError: A row has none; names it.
    """
    empty = ((labels[:, 1:] != IGNORE_INDEX).sum(1) == 0).nonzero().flatten().tolist()
    if not empty:
        return
    names = rows()
    named = ', '.join(names[row] for row in empty[:_MAX_NAMED]) if names else f'row {empty[0] + 1} of a micro-batch'
    raise TrainingError(
        f'step {step + 1}: every token of {named} is masked; nothing to train on'
        ' (`xtuner log-dataset` shows what is trained)'
    )


def check_gradients(model: nn.Module, step: int) -> None:
    """Checks after a backward pass for adapters, or single parameters, without a gradient.

    The first factor of a new LoRA has a zero gradient, since the second factor is zero; so an adapter counts as a
    whole. An expert without a gradient is only reported if others of its group have one: no token was routed to it.

    Raises:
        TrainingError: There is one; names it.
    """
    has_gradient = _has_gradient(model)
    trained_groups = {_experts_of(name) for name, has in has_gradient.items() if has}
    idle = [name for name, has in has_gradient.items() if not has]
    unreached = [name for name in idle if _experts_of(name) and _experts_of(name) in trained_groups]
    if unreached:
        logger.info(
            'step %d: no token was routed to %d adapters of experts (%s ...); they train once one is',
            step + 1, len(unreached), unreached[0],
        )  # fmt: skip
        idle = [name for name in idle if name not in set(unreached)]
    if idle:
        raise TrainingError(
            f'step {step + 1}: no gradient for {first_few(idle, _MAX_NAMED)}: the loss does not depend on it; remove '
            'it from adapter.target_modules'
        )


def _experts_of(name: str) -> str:
    """The expert group of a module, such as 'layers.3.mlp.experts'; '' for other modules."""
    match = _EXPERT.match(name)
    return match[1] if match else ''


def _has_gradient(model: nn.Module) -> dict[str, bool]:
    """For each adapted module or single parameter: whether one of its parameters has a non-zero gradient."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    result: dict[str, bool] = {}
    for name, parameter in trainable_parameters(model).items():
        owner = _owner(name, adapted)
        nonzero = parameter.grad is not None and bool(_full_gradient(parameter.grad).any())
        result[owner] = result.get(owner, False) or nonzero
    return result


def _full_gradient(gradient: Any) -> Tensor:
    """Gathers a sharded gradient; a collective of all ranks."""
    return gradient.full_tensor() if hasattr(gradient, 'full_tensor') else gradient


def _owner(name: str, adapted: set[str]) -> str:
    """The adapted module that a parameter belongs to, or the parameter's own name."""
    parts = name.split('.')
    return next((prefix for end in range(len(parts)) if (prefix := '.'.join(parts[:end])) in adapted), name)
