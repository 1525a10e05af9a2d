"""SIGTERM and Ctrl-C: recorded during training, handled between micro-batches."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from xtuner.errors import Interrupted

logger = logging.getLogger('xtuner')

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StepStopped(Exception):
    """A signal ends the run within a step, which is discarded."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number


class StopRequest:
    """Handles both signals within a `with` block; the first is recorded, a second one stops at once.

    Attributes:
        signal_number: The received signal; None: none.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread can set handlers, and only it receives signals.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise Interrupted(number, 'stopped at once; the last checkpoint is kept')
        self.signal_number = number
        logger.warning(
            '%s: saving before the next micro-batch; another signal stops at once', signal.Signals(number).name
        )
