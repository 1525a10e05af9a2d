"""What goes wrong on one rank of the tests: hooks and a map function that a config names."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from mmengine.hooks import Hook


class Killed(Hook):
    """Rank 1 is killed in the middle of a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.rank == 1 and batch_idx + 1 == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


class Hangs(Hook):
    """Rank 1 stops for good."""

    def __init__(self, step: int) -> None:
        self._step = step

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.rank == 1 and batch_idx + 1 == self._step:
            time.sleep(600)


def slow_map(record: dict[str, Any]) -> dict[str, Any]:
    """The OpenAI form, at a second a record."""
    time.sleep(1)
    return {'conversation': [{'input': record['messages'][0]['content'], 'output': record['messages'][1]['content']}]}
