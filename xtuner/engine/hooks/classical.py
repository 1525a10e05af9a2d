"""Hooks that classical configs name, whose work is done elsewhere or always."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import barrier
from mmengine.hooks import Hook


class VarlenAttnArgsToMessageHubHook(Hook):
    """No effect: position ids separate a batch's samples for every attention implementation."""

    def __init__(self, args: tuple[str, ...] = ()) -> None:
        """Accepts the names of arguments to pass on."""


class ThroughputHook(Hook):
    """No effect: each log line and each line of `metrics.jsonl` contains tokens per second."""

    def __init__(self, **settings: Any) -> None:
        """Accepts the settings of the throughput computation."""


class HFCheckpointHook(Hook):
    """Writes the trained weights once more at the end, without the state for resuming.

    Args:
        out_dir: The folder; None for `hf_model` in the work folder.
    """

    priority = 'VERY_LOW'

    def __init__(self, out_dir: str | None = None) -> None:
        self._out_dir = out_dir

    def after_train(self, runner: Any) -> None:
        """Writes adapter (or model), tokenizer and generation settings."""
        weights = runner.strategy.weights()  # a collective: every rank takes part
        if runner.rank == 0:
            folder = Path(self._out_dir or Path(runner.work_dir) / 'hf_model')
            folder.mkdir(parents=True, exist_ok=True)
            runner.write_model(folder, weights)
        barrier()
