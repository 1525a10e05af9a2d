"""Faults that happen inside a run, as hooks that a config can name."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook


class At(Hook):
    """Does something before one step, counted from 1."""

    priority = 'VERY_HIGH'

    def __init__(self, step: int, **values: Any) -> None:
        self.step, self.values = step, values

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if batch_idx + 1 == self.step:
            self.strike(runner)

    def strike(self, runner: Any) -> None:
        raise NotImplementedError


class FillDisk(At):
    """Leaves `free` bytes of the work folder's disk."""

    def strike(self, runner: Any) -> None:
        folder = Path(runner.work_dir)
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder.parent / 'filler').write_bytes(bytes(free - self.values['free']))


class KillWorker(At):
    """Kills the processes that read batches."""

    def strike(self, runner: Any) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
        time.sleep(10)  # torch's handler of SIGCHLD ends it by an error: else the run gets on as far as it may


class Poison(Hook):
    """Makes the loss not a number in one micro-batch of one step, both counted from 1."""

    def __init__(self, step: int, micro_batch: int = 1, steps: int = 1) -> None:
        self.first, self.micro_batch, self.last = step, micro_batch, step + steps - 1

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        count = 0

        def spoil(module: Any, arguments: Any, loss: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return loss * math.nan if count == self.micro_batch else loss

        self.handle = None
        if self.first <= batch_idx + 1 <= self.last:
            self.handle = runner.bare_model.register_forward_hook(spoil)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.handle is not None:
            self.handle.remove()


class RunOut(At):
    """The forward pass runs out of memory."""

    def strike(self, runner: Any) -> None:
        def fail(*_: Any) -> None:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

        runner.bare_model.register_forward_pre_hook(fail)


class Detach(At):
    """Takes one adapter out of the graph: its output no longer depends on it."""

    def strike(self, runner: Any) -> None:
        for name, parameter in runner.bare_model.named_parameters():
            if 'layers.1.self_attn.q_proj.lora' in name:
                parameter.register_hook(torch.zeros_like)


class Mask(At):
    """Takes the targets out of the second micro-batch."""

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if batch_idx + 1 == self.step:
            data_batch[1]['labels'].fill_(-100)


class Signal(At):
    """Sends this process signals."""

    def strike(self, runner: Any) -> None:
        for number in self.values['numbers']:
            os.kill(os.getpid(), number)


class SlowStep(At):
    """Each micro-batch of a step takes its time; after one of them, counted from 1, a signal comes to one rank.

    The work folder's `micro-batches-RANK` tells how many were computed in that step.
    """

    def strike(self, runner: Any) -> None:
        values, told = self.values, Path(runner.work_dir) / f'micro-batches-{runner.rank}'
        count = 0

        def wait(*_: Any) -> None:
            nonlocal count
            count += 1
            told.write_text(str(count), encoding='utf-8')
            time.sleep(values['seconds'][runner.rank])
            if count == values['micro_batch'] and runner.rank == values['rank']:
                os.kill(os.getpid(), signal.SIGTERM)

        runner.bare_model.register_forward_hook(wait)


class JumpClock(Hook):
    """Moves the wall clock by a day at every step, forth and back."""

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        real = time.time() if batch_idx == 0 else self.real
        self.real = real
        time.time = lambda: real + 86400 * (-1) ** batch_idx  # type: ignore[assignment]
