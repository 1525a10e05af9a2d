"""Result of a training step, and counts of skipped steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass


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
    """What one optimizer step did, over all ranks. Hooks get it as the dict `outputs`.

    Attributes:
        loss: Mean negative log-likelihood, in nats a target token.
        grad_norm: L2 norm of the gradient before clipping.
        lr: Learning rate of the first parameter group.
        num_targets: Target tokens.
        num_tokens: Tokens computed, padding included.
        seconds: Wall time, data loading included.
        skipped: The gradient was not finite, so no weight was changed.
        num_skipped: Steps skipped so far, this one included.
    """

    loss: float
    grad_norm: float
    lr: float
    num_targets: int
    num_tokens: int
    seconds: float
    skipped: bool
    num_skipped: int
