"""Models, adapters, loss. Classical configs import `SupervisedFinetune` from here; it is loaded when asked for."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == 'SupervisedFinetune':
        from xtuner.model.sft import SupervisedFinetune

        return SupervisedFinetune
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
