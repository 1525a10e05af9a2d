"""What the micro-batches of a step were made of, for messages."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from xtuner.engine.step_result import Skips

logger = logging.getLogger('xtuner')

# What a micro-batch of a step, both counted from 0, was made of: a text for each row.
Origins = Callable[[int, int], Sequence[str]]


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
