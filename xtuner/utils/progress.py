"""Shows progress and remaining time of long operations: a bar on a terminal, otherwise a log line every few seconds.

tqdm draws the bars: huggingface_hub and transformers accept tqdm classes, so their downloads and loading look the same.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from xtuner.ranks import is_first_process
from xtuner.utils.escape import printable
from xtuner.utils.units import clock, gigabytes

logger = logging.getLogger('xtuner')

_EVERY_S = 5.0  # interval of log lines
_DELAY_S = 0.5  # shorter operations draw no bar


class Progress(tqdm):
    """A tqdm bar on stderr, erased when done; if stderr is not a terminal, a log line every few seconds.

    Only the first process of a run shows anything. `update` may be called from several threads.

    Args:
        iterable: The items; None: the caller calls `update`.
        desc: The operation, such as 'Loading weights'.
        total: Number of items; None: `len(iterable)`, or unknown, without a remaining time.
        unit: Unit of the count; 'B' for bytes.
        lines: Whether to log lines if stderr is not a terminal; False for operations with their own log lines.
        options: Options of tqdm, except `disable` and `file`, which are set here.
    """

    monitor_interval = 0  # no monitor thread
    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str | None = None,
        total: float | None = None,
        *,
        unit: str = 'it',
        lines: bool = True,
        **options: Any,
    ) -> None:
        self._is_bar = sys.stderr.isatty()
        self._started = self._logged = self.clock()
        self._count_lock = threading.Lock()
        options |= {'disable': not is_first_process() or not (self._is_bar or lines), 'file': sys.stderr}
        options = {'leave': False, 'delay': _DELAY_S, 'dynamic_ncols': True, 'unit_scale': unit == 'B'} | options
        super().__init__(iterable, printable(desc or ''), total, unit=unit, **options)

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def update(self, n: float | None = 1) -> bool | None:
        """Counts completed items; returns True if a bar was drawn."""
        with self._count_lock:
            if self._is_bar or self.disable:
                return super().update(n)
            self.n += n or 0
            return self.display()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draws the bar, or logs a line if one is due."""
        if self._is_bar:
            return super().display(msg, pos)
        now = self.clock()
        if now - self._logged >= _EVERY_S and self.n > self.initial and self.n != self.total:
            self._logged = now
            logger.info('%s', self._line(now - self._started))
        return False

    def _line(self, seconds: float) -> str:
        """'Loading weights: 40 % · eta 0:00:18', with sizes and speed for bytes; a count without a total."""
        done, speed = self.n - self.initial, (self.n - self.initial) / max(seconds, 1e-9)
        parts = [f'{100 * self.n / self.total:.0f} %'] if self.total else []
        if self.unit == 'B':
            parts += [f'{gigabytes(self.n)} of {gigabytes(self.total)}' if self.total else gigabytes(self.n)]
            parts += [f'{gigabytes(speed)}/s']
        elif not self.total:
            parts += [f'{done:,.0f} {self.unit}']
        if self.total:
            parts += [f'eta {clock(max(0.0, self.total - self.n) / speed)}']
        return f'{self.desc.removesuffix(": ")}: {" · ".join(parts)}'


def close_bars() -> None:
    """Erases bars left by an error, so that its message stands alone."""
    for bar in list(getattr(tqdm, '_instances', ())):
        bar.close()


@contextmanager
def above_bars() -> Iterator[None]:
    """Lets a `with` block write to the terminal: bars are erased before it and redrawn below its output."""
    if not getattr(tqdm, '_instances', None) or not sys.stderr.isatty():
        yield
        return
    with Progress.external_write_mode(file=sys.stderr):
        yield


@contextmanager
def shown_by_transformers() -> Iterator[None]:
    """Replaces the bars of transformers by `Progress` in a `with` block."""
    from transformers.utils import logging as bars

    before = bars.set_tqdm_hook(lambda factory, args, kwargs: Progress(*args, **kwargs))
    try:
        yield
    finally:
        bars.set_tqdm_hook(before)


def _forget_bars() -> None:
    """Resets bars and lock in a forked process: they belong to the parent, whose thread may hold the lock."""
    Progress.set_lock(threading.RLock())
    tqdm._instances.clear()


Progress.set_lock(threading.RLock())
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=lambda: _forget_bars() if hasattr(tqdm, '_instances') else None)
