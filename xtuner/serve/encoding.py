"""From messages to token ids in a thread, so that a long rendering stops neither the event loop nor other streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from xtuner.serve.problems import Problem

WAIT_S = 30.0  # seconds that a request waits for those before it
STUCK_S = 30.0  # seconds after which a rendering counts as stuck

T = TypeVar('T')


class Encoding:
    """Encodes one request at a time: tokenizers are not made for several threads."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._began: float | None = None

    @property
    def trouble(self) -> str:
        """Why no request is encoded; '' where all is well."""
        seconds = 0.0 if self._began is None else time.monotonic() - self._began
        return f'encoding a prompt is stuck for {seconds:.0f} s' if seconds > STUCK_S else ''

    async def run(self, encode: Callable[[], T]) -> T:
        """Runs `encode` in a thread, in its turn.

        Raises:
            Problem: status 503: the turn did not come in `WAIT_S`.
        """
        try:
            await asyncio.wait_for(self._lock.acquire(), WAIT_S)
        except asyncio.TimeoutError:
            raise Problem(503, f'prompts before this one took more than {WAIT_S:g} s to encode; try again later',
                          headers={'Retry-After': '5'}) from None  # fmt: skip
        self._began = time.monotonic()
        task = asyncio.ensure_future(asyncio.to_thread(encode))
        task.add_done_callback(self._end)
        return await asyncio.shield(task)

    def _end(self, task: asyncio.Future[T]) -> None:
        """Lets the next one begin: when the thread is done, even if its client has gone meanwhile."""
        if not task.cancelled():
            task.exception()  # taken note of: nobody else may be there to do so
        self._began = None
        self._lock.release()
