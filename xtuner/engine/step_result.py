"""Result of a training step, counts of skipped steps, and names of the rows of its micro-batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

logger = logging.getLogger('xtuner')

# What a micro-batch of a step, both counted from 0, was made of: a text for each row.
Origins = Callable[[int, int], Sequence[str]]
RESERVED = frozenset({
    'step', 'loss', 'lr', 'grad_norm', 'num_targets', 'num_tokens', 'tokens_per_second', 'seconds', 'peak_memory_gib',
    'skipped', 'num_skipped', 'val_loss', 'metrics',
})  # fmt: skip
"""What a line of `metrics.jsonl` has of every run: an objective's metrics have other names."""


@dataclass
class Skips:
    """Counts of steps with a non-finite gradient; saved in checkpoints, so that a resumed run continues them."""

    total: int = 0
    in_a_row: int = 0

    def note(self, skipped: bool) -> None:
        """Counts a step."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def state(self) -> dict[str, int]:
        """Arguments of `Skips(**state)`."""
        return asdict(self)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks. Hooks get it as the dict `outputs`, metrics by their own names.

    Attributes:
        loss: The objective's loss, divided by its weight: for supervised fine-tuning the mean negative log-likelihood,
            in nats a target token.
        grad_norm: L2 norm of the gradient before clipping.
        lr: Learning rate of the first parameter group.
        num_targets: Target tokens.
        num_tokens: Tokens computed, padding included.
        seconds: Wall time, data loading included.
        skipped: The gradient was not finite, so no weight was changed.
        num_skipped: Steps skipped so far, this one included.
        metrics: The objective's metrics, divided by its weight.
    """

    loss: float
    grad_norm: float
    lr: float
    num_targets: int
    num_tokens: int
    seconds: float
    skipped: bool
    num_skipped: int
    metrics: dict[str, float] = field(default_factory=dict)

    def outputs(self) -> dict[str, Any]:
        """What hooks get: numbers by name."""
        values = asdict(self)
        return values | values.pop('metrics')

    @classmethod
    def of_outputs(cls, outputs: Mapping[str, Any]) -> StepResult:
        """The inverse of `outputs`."""
        names = {each.name for each in fields(cls)}
        metrics = {name: value for name, value in outputs.items() if name not in names}
        return cls(**{name: value for name, value in outputs.items() if name in names}, metrics=metrics)


class StepOrigins:
    """Names the rows of a step's micro-batches.

    Args:
        origins: Names the rows of one micro-batch; None: nobody knows.
    """

    def __init__(self, origins: Origins | None) -> None:
        self._origins = origins

    def rows(self, step: int, number: int) -> Sequence[str]:
        """A text for each row of a micro-batch; empty where nobody knows."""
        return self._origins(step, number) if self._origins else ()

    def describe(self, step: int, numbers: Iterable[int]) -> str:
        """What was in these micro-batches."""
        return '; '.join(f'micro-batch {n + 1}: {", ".join(self.rows(step, n)) or "unknown"}' for n in numbers)

    def report_skip(self, step: int, skips: Skips, loss: float, grad_norm: float, losses: Sequence[Tensor]) -> None:
        """Says which samples a gradient came from that is not finite: those whose loss is not, or else all."""
        wrong = [number for number, value in enumerate(losses) if not math.isfinite(value.item())]
        if not math.isfinite(loss) and not wrong:
            return  # another rank's, which reports it
        logger.warning(
            'step %d: loss %g, gradient norm %g; no weight was changed (%d steps skipped so far, %d in a row); %s',
            step + 1,
            loss,
            grad_norm,
            skips.total,
            skips.in_a_row,
            self.describe(step, wrong or range(len(losses))),
        )
