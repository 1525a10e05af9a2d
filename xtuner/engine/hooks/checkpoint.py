"""Writes a checkpoint every `interval` steps, at the end, and when the run is asked to stop."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mmengine.dist import barrier
from mmengine.hooks import Hook

from xtuner.adapters.attach import trainable_parameters
from xtuner.engine.checkpoint.disk_space import check_space, checkpoint_bytes
from xtuner.engine.checkpoint.store import write_checkpoint
from xtuner.engine.checkpoint.trainer_state import VALIDATION_LOSS
from xtuner.errors import Interrupted

logger = logging.getLogger('xtuner')


class CheckpointHook(Hook):
    """Saves through the runner; a stop request saves the last completed step, unless it is saved, and ends the run.

    Args:
        interval: Optimizer steps between two checkpoints.
        max_keep: Number of checkpoints to keep; -1 keeps all.
        keep_best: Whether to also keep the one with the lowest validation loss.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: int, max_keep: int, *, keep_best: bool = True) -> None:
        self._interval, self._max_keep, self._keep_best = interval, max_keep, keep_best
        self._saved = 0

    def before_train(self, runner: Any) -> None:
        """A resumed run starts at a saved step."""
        self._saved = runner.iter

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Saves if it is due.

        Raises:
            Interrupted: A signal was received; the checkpoint is written.
            CheckpointError: The disk is full, or writing fails.
        """
        step = runner.iter + 1
        signal_number = runner.train_loop.stop_signal
        if signal_number is not None or step % self._interval == 0 or step == runner.max_iters:
            self._save(runner, step)
        if signal_number is not None:
            raise self._interrupted(signal_number, step)

    def after_stop(self, runner: Any, signal_number: int) -> None:
        """Saves the last completed step after a signal ended the run within a step.

        Raises:
            Interrupted: Always.
            CheckpointError: As `after_train_iter`.
        """
        step = runner.iter
        if step == 0:
            raise Interrupted(signal_number, 'stopped in the first step; nothing was trained or saved')
        if step != self._saved:
            self._save(runner, step)
        raise self._interrupted(signal_number, step)

    @staticmethod
    def _interrupted(signal_number: int, step: int) -> Interrupted:
        return Interrupted(signal_number, f'stopped at step {step}, saved; the same command with --resume continues')

    def _save(self, runner: Any, step: int) -> None:
        state, weights = runner.trainer_state(step), runner.strategy.weights()  # collectives: every rank takes part
        if runner.rank == 0:
            work_dir, optimizer = Path(runner.work_dir), runner.optim_wrapper.optimizer
            needed = checkpoint_bytes(trainable_parameters(runner.bare_model).values(), optimizer.state)
            check_space(work_dir, needed, f'the checkpoint of step {step} would')
            folder = write_checkpoint(
                work_dir,
                step,
                write_model=lambda to: runner.write_model(to, weights),
                state=state | {VALIDATION_LOSS: runner.train_loop.validation_loss},
                max_keep=self._max_keep,
                keep_best=self._keep_best,
            )
            logger.info('saved %s', folder)
        self._saved = step
        barrier()
