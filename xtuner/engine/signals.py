"""SIGTERM and Ctrl-C: noted while training, acted on between two micro-batches."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from xtuner.errors import Interrupted

logger = logging.getLogger('xtuner')

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Takes over the two signals for the time of a `with` block; the first is noted, a second one stops at once.

    Attributes:
        signal_number: The signal that came; None: none did.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other thread may, and none gets signals
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise Interrupted(number, 'stopped at once; the last checkpoint is kept')
        self.signal_number = number
        logger.warning('%s: saving before the next micro-batch; once more stops at once', signal.Signals(number).name)
