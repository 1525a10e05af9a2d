"""Hooks that classical configs name and whose work is done elsewhere here, or always."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import barrier
from mmengine.hooks import Hook


class VarlenAttnArgsToMessageHubHook(Hook):
    """No effect: a batch's positions tell its samples apart, and every attention implementation reads them."""

    def __init__(self, args: tuple[str, ...] = ()) -> None:
        """Takes the names of what was to be handed on."""


class ThroughputHook(Hook):
    """No effect: each log line and each line of `metrics.jsonl` holds tokens a second."""

    def __init__(self, **settings: Any) -> None:
        """Takes what the rate was to be worked out from."""


class HFCheckpointHook(Hook):
    """Writes what was trained once more at the end, without the state to resume from.

    Args:
        out_dir: The folder; None for `hf_model` in the work folder.
    """

    priority = 'VERY_LOW'

    def __init__(self, out_dir: str | None = None) -> None:
        self._out_dir = out_dir

    def after_train(self, runner: Any) -> None:
        """Writes adapter (or model), tokenizer and generation settings."""
        weights = runner.strategy.weights()  # every rank has a part in it
        if runner.rank == 0:
            folder = Path(self._out_dir or Path(runner.work_dir) / 'hf_model')
            folder.mkdir(parents=True, exist_ok=True)
            runner.write_model(folder, weights)
        barrier()
