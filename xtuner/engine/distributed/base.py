"""The interface between the loop and whatever holds model and optimizer on one or many ranks; and one rank's own.

A checkpoint never knows the strategy: `weights` and `optimizer_state` give whole tensors under the names and numbers
that a single process uses, and `load_optimizer_state` takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.adapters.attach import trainable_parameters

# Makes the config's optimizer over the parameters it is given.
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Strategy:
    """One process: the base of the others.

    Args:
        rank: This process.
        world_size: Processes.
    """

    name = 'single'
    # By what a rank's gradient has to be multiplied, so that what the ranks end up with is the sum over all of them.
    gradient_factor = 1.0
    # Whether every rank must take part in each forward pass, because weights are put together for it.
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
        """The module that the loop calls."""
        return model

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes, on this rank."""
        return list(trainable_parameters(self.bare).values())

    def synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch; `last` of its step or not."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient; after the step's last one, `gradients` are complete."""
        loss.backward()

    def on_reduce(self, call: Callable[[], None]) -> None:
        """Calls `call()` when this rank has come to where gradients are added up, if the strategy can tell."""

    def clip(self, scaler: torch.amp.GradScaler, max_norm: float) -> float:
        """Completes the step's gradients and clips them; returns their L2 norm before, over all ranks."""
        scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters(), max_norm).item()

    def step(self, scaler: torch.amp.GradScaler, *, skipped: bool) -> None:
        """Changes the parameters, unless the step is skipped, and forgets the gradients."""
        if not skipped:
            scaler.step(self.optimizer)
        if scaler.is_enabled():  # lowers its scale where a gradient was not finite
            scaler.update()
        self.forget()

    def forget(self) -> None:
        """Drops the gradients that were added up so far."""
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self) -> AbstractContextManager[Any]:
        """A context in which the model can generate; where weights are sharded, all ranks enter it."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor] | None:
        """Whole trained tensors by name, for `save_pretrained`; None where the model holds them itself.

        Every rank calls it; only rank 0's result is of use.
        """
        return None

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's `state_dict` as a single process has it; every rank calls it, rank 0's is complete."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """The inverse, on every rank."""
        self.optimizer.load_state_dict(state)


def leaves(state: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """A parameter's optimizer state without its nesting, which bitsandbytes' optimizers have: values by their path."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in state.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


def nested(found: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """The inverse of `leaves`."""
    state: dict[str, Any] = {}
    for (*sections, last), value in found.items():
        here = state
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
    return state


Single = Strategy
