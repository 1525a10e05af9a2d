"""Progress on the console, every step's numbers in `metrics.jsonl`, and in the trackers a config names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from xtuner.engine.loop import StepResult
from xtuner.tracking.files import METRICS_FILE
from xtuner.utils.jsonl import append_line, truncate_after
from xtuner.utils.progress import Progress
from xtuner.utils.units import clock

logger = logging.getLogger('xtuner')

_SMOOTHING = 0.9  # of the step time behind the ETA: about the last ten steps


class LogHook(Hook):
    """Reports each step. Runs on the first rank only.

    Args:
        interval: Optimizer steps between two console lines; the file gets every step.
    """

    priority = 'BELOW_NORMAL'

    def __init__(self, interval: int = 1) -> None:
        self._interval = interval
        self._seconds: float | None = None
        self._bar: Progress | None = None

    def before_train(self, runner: Any) -> None:
        """Drops the lines of steps that a resumed run will do again, so that each step stands in the file once."""
        if runner.rank == 0:
            truncate_after(Path(runner.work_dir) / METRICS_FILE, runner.iter)
            self._bar = Progress(
                desc='training', total=runner.max_iters, initial=runner.iter, unit='steps', lines=False
            )

    def after_train(self, runner: Any) -> None:
        """Erases the bar."""
        if self._bar is not None:
            self._bar.close()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Writes the step's line, and prints each `interval`-th, the first and the last."""
        if runner.rank != 0:
            return
        result = StepResult.of_outputs(outputs)
        step, last = runner.iter + 1, runner.max_iters
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        speed = result.num_tokens / result.seconds
        numbers = {
            'step': step,
            'loss': result.loss,
            'lr': result.lr,
            'grad_norm': result.grad_norm,
            'num_targets': result.num_targets,
            'num_tokens': result.num_tokens,
            'tokens_per_second': round(speed, 1),
            'seconds': round(result.seconds, 4),
            'peak_memory_gib': round(memory, 3),
            'skipped': result.skipped,
            'num_skipped': result.num_skipped,
            **result.metrics,
        }
        append_line(Path(runner.work_dir) / METRICS_FILE, numbers)
        scalars = {f'train/{k}': v for k, v in numbers.items() if k != 'step'}
        runner.visualizer.add_scalars(scalars, step=step)
        first = self._seconds is None
        before = result.seconds if self._seconds is None else self._seconds
        self._seconds = _SMOOTHING * before + (1 - _SMOOTHING) * result.seconds
        if self._bar is not None:
            self._bar.update()
        if first or step % self._interval == 0 or step == last or result.skipped:
            epoch = runner.train_loop.plan.epochs_after(step)
            place = f'step {step:{len(str(last))}}/{last} · epoch {epoch:.2f}'
            peak = f' · peak {memory:.1f} GiB' if memory else ''
            skipped = ' · SKIPPED: gradient not finite' if result.skipped else ''
            metrics = ''.join(f' · {name} {value:.4g}' for name, value in result.metrics.items())
            logger.info(
                '%s · loss %.4f%s · lr %.2e · grad norm %.3f · %s tokens/s%s · eta %s%s',
                place,
                result.loss,
                metrics,
                result.lr,
                result.grad_norm,
                f'{speed:,.0f}',
                peak,
                clock((last - step) * self._seconds),
                skipped,
            )
