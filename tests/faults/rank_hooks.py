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


class FailsToSample(Hook):
    """Generating fails on some ranks, in a layer of the model, as where memory runs out."""

    priority = 'VERY_HIGH'

    def __init__(self, failing: list[int], after: int = 2) -> None:
        self._failing, self._left = failing, after

    def before_train(self, runner: Any) -> None:
        def fail(module: Any, *_: Any) -> None:
            if module.training or runner.rank not in self._failing:
                return
            self._left -= 1
            if self._left < 0:
                raise RuntimeError('no memory for the sample')

        base = runner.bare_model.llm.get_base_model()
        base.get_decoder().layers[1].self_attn.register_forward_pre_hook(fail)


def slow_map(record: dict[str, Any]) -> dict[str, Any]:
    """The OpenAI form, at a second a record."""
    time.sleep(1)
    return {'conversation': [{'input': record['messages'][0]['content'], 'output': record['messages'][1]['content']}]}
