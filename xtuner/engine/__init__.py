"""Training: runner, loop, hooks, checkpoints. The names below are those that classical configs import from here."""

from __future__ import annotations

from typing import Any

_CLASSICAL = (
    'DatasetInfoHook',
    'EvaluateChatHook',
    'HFCheckpointHook',
    'ThroughputHook',
    'VarlenAttnArgsToMessageHubHook',
)


def __getattr__(name: str) -> Any:
    if name in _CLASSICAL:
        from xtuner.engine import hooks

        return getattr(hooks, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
