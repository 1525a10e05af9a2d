"""Interface between the loop and a model and optimizer on one or several ranks; and the single-process strategy.

Checkpoints do not depend on the strategy: `weights` and `optimizer_state` return full tensors under the names and
numbers of a single process, and `load_optimizer_state` accepts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.adapters.attach import trainable_parameters

# Creates the config's optimizer for the given parameters.
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Strategy:
    """The single-process strategy, and the base of the others.

    Args:
        rank: Rank of this process.
        world_size: Number of processes.
    """

    name = 'single'
    # Factor for a rank's gradient such that the reduced gradient is the sum over all ranks.
    gradient_factor = 1.0
    # Whether every rank must take part in each forward pass, because weights are gathered for it.
    together = False
    # Whether parameters hold their gradients between `clip` and `step`.
    has_gradients = True

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.bare: Any = None
        self.module: Any = None
        self.optimizer: Any = None

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> Strategy:
        """Takes a `TrainingModel` on its device; afterwards `module` is what the loop calls, `bare` the model."""
        self.bare = model
        self.module = self.wrap(model)
        self.optimizer = make_optimizer(self.parameters())
        return self

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the module that the loop calls."""
        return model

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates on this rank."""
        return list(trainable_parameters(self.bare).values())

    def synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Context of a micro-batch, which is or is not the `last` of its step."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient; after the last one of a step, `gradients` are complete."""
        loss.backward()

    def on_reduce(self, call: Callable[[], None]) -> None:
        """Calls `call()` whenever this rank reaches a gradient reduction, if the strategy can detect it."""

    def clip(self, scaler: torch.amp.GradScaler, max_norm: float) -> float:
        """Completes and clips the step's gradients; returns their L2 norm before clipping, over all ranks."""
        scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters(), max_norm).item()

    def step(self, scaler: torch.amp.GradScaler, *, skipped: bool) -> None:
        """Updates the parameters, unless the step is skipped, and drops the gradients."""
        if not skipped:
            scaler.step(self.optimizer)
        if scaler.is_enabled():  # lowers its scale if a gradient was not finite
            scaler.update()
        self.forget()

    def forget(self) -> None:
        """Drops the accumulated gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self) -> AbstractContextManager[Any]:
        """Context in which the model can generate; if weights are sharded, all ranks must enter it."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor] | None:
        """Full trained tensors by name, for `save_pretrained`; None if the model holds them itself.

        A collective; only rank 0's result is used.
        """
        return None

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's `state_dict` as in a single process; a collective, complete on rank 0."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """The inverse of `optimizer_state`, on every rank."""
        self.optimizer.load_state_dict(state)


def leaves(state: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Flattens a parameter's optimizer state, which bitsandbytes nests: values by their path."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in state.items():
        flat |= leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return flat


def nested(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """The inverse of `leaves`."""
    state: dict[str, Any] = {}
    for (*sections, last), value in flat.items():
        here = state
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
    return state


Single = Strategy
