"""Progress on the console, every step's numbers in `metrics.jsonl`, and in the trackers a config names."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from xtuner.engine.loop import StepResult

logger = logging.getLogger('xtuner')

METRICS_FILE = 'metrics.jsonl'
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

    def before_train(self, runner: Any) -> None:
        """Drops the lines of steps that a resumed run will do again, so that each step stands in the file once."""
        path = Path(runner.work_dir) / METRICS_FILE
        if runner.rank == 0 and path.is_file():
            lines = path.read_text(encoding='utf-8').splitlines()
            kept = [line for line in lines if _step_of(line) <= runner.iter]
            path.write_text(''.join(f'{line}\n' for line in kept), encoding='utf-8')

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Writes the step's line, and prints each `interval`-th, the first and the last."""
        if runner.rank != 0:
            return
        result = StepResult(**outputs)
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
        }
        append_metrics(Path(runner.work_dir), numbers)
        scalars = {k: v for k, v in numbers.items() if k != 'step'}
        runner.visualizer.add_scalars(scalars, step=step)
        first = self._seconds is None
        before = result.seconds if self._seconds is None else self._seconds
        self._seconds = _SMOOTHING * before + (1 - _SMOOTHING) * result.seconds
        if first or step % self._interval == 0 or step == last or result.skipped:
            epoch = step * runner.train_loop.plan.items_per_step / runner.train_loop.plan.num_items
            place = f'step {step:{len(str(last))}}/{last} · epoch {epoch:.2f}'
            peak = f' · peak {memory:.1f} GiB' if memory else ''
            skipped = ' · SKIPPED: gradient not finite' if result.skipped else ''
            logger.info(
                '%s · loss %.4f · lr %.2e · grad norm %.3f · %s tokens/s%s · eta %s%s',
                place,
                result.loss,
                result.lr,
                result.grad_norm,
                f'{speed:,.0f}',
                peak,
                _clock((last - step) * self._seconds),
                skipped,
            )


def append_metrics(work_dir: Path, numbers: dict[str, Any]) -> None:
    """Adds one line to `metrics.jsonl`; `numbers` holds the `step` it belongs to."""
    with (work_dir / METRICS_FILE).open('a', encoding='utf-8') as file:
        file.write(json.dumps(numbers) + '\n')


def _step_of(line: str) -> float:
    """The step of a metrics line; a line torn by a crash counts as beyond the end."""
    try:
        return int(json.loads(line)['step'])
    except (ValueError, KeyError, TypeError):
        return float('inf')


def _clock(seconds: float) -> str:
    """'1:02:03' for 3723 seconds."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f'{hour}:{minute:02}:{second:02}'
