"""Writes a checkpoint each so many steps, at the end, and when the run is asked to stop."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

from mmengine.dist import barrier
from mmengine.hooks import Hook

from xtuner.engine.checkpoints import write_checkpoint
from xtuner.errors import Interrupted

logger = logging.getLogger('xtuner')


class CheckpointHook(Hook):
    """Saves through the runner; SIGTERM and SIGINT save once, after the step under way, and end the run.

    Args:
        interval: Optimizer steps between two checkpoints.
        max_keep: How many are kept; -1 keeps all.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: int, max_keep: int) -> None:
        self._interval, self._max_keep = interval, max_keep
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def before_train(self, runner: Any) -> None:
        """Takes over the two signals for the time of training."""
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Saves when it is time.

        Raises:
            Interrupted: a signal came; the checkpoint is written.
        """
        step = runner.iter + 1
        if self._signal is not None or step % self._interval == 0 or step == runner.max_iters:
            self._save(runner, step)
        if self._signal is not None:
            raise Interrupted(self._signal, f'stopped at step {step}, saved; the same command with --resume goes on')

    def after_train(self, runner: Any) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self._signal is not None:  # asked twice: now
            raise Interrupted(number, 'stopped at once; the last checkpoint is kept')
        self._signal = number
        logger.warning('%s: saving after this step; once more stops at once', signal.Signals(number).name)

    def _save(self, runner: Any, step: int) -> None:
        state, weights = runner.trainer_state(step), runner.strategy.weights()  # every rank has a part in these
        if runner.rank == 0:
            folder = write_checkpoint(
                Path(runner.work_dir),
                step,
                write_model=lambda to: runner.write_model(to, weights),
                state=state,
                max_keep=self._max_keep,
            )
            logger.info('saved %s', folder)
        barrier()
