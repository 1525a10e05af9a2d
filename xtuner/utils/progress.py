"""Progress of what takes long, as log lines with the time that is left: alike on a terminal and in a file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger('xtuner')

_EVERY_S = 5.0


class LoggedProgress:
    """Stands in for a tqdm bar over things of a known number: a line every few seconds, none for what is quick.

    Args:
        items: What is gone through.
        desc: What is done, such as 'Loading weights'.
        total: How many items there are; None: `len(items)`.
        clock: Seconds.
    """

    def __init__(
        self,
        items: Iterable[Any] = (),
        *,
        desc: str = '',
        total: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        **_: Any,
    ) -> None:
        self._items, self._what, self._clock = items, desc, clock
        self._total = total if total is not None else len(items) if isinstance(items, Sized) else 0
        self._done = 0
        self._started = self._said = clock()

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        """Counts items as done."""
        self._done += count
        now = self._clock()
        if now - self._said < _EVERY_S or not 0 < self._done < self._total:
            return
        self._said = now
        left = (now - self._started) / self._done * (self._total - self._done)
        minutes, seconds = divmod(round(left), 60)
        logger.info('%s: %.0f %% · eta %d:%02d', self._what, 100 * self._done / self._total, minutes, seconds)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Whatever else a bar can do changes nothing."""
        return lambda *args, **kwargs: None


@contextmanager
def progress_as_lines() -> Iterator[None]:
    """Turns the bars that transformers draws in a `with` block into log lines."""
    from transformers.utils import logging as bars

    before = bars.set_tqdm_hook(lambda factory, args, kwargs: LoggedProgress(*args, **kwargs))
    try:
        yield
    finally:
        bars.set_tqdm_hook(before)
