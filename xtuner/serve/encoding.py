"""From messages to token ids in threads, so that a slow rendering stops neither the event loop nor other requests."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from xtuner.serve.problems import APIError

THREADS = 32  # more than slow chat templates may keep waiting: see the places of `xtuner.dataset.templates.worker_pool`
WAIT_S = 30.0  # seconds that a request waits for a thread
STUCK_S = 120.0  # seconds after which an encoding counts as stuck

T = TypeVar('T')


class Encoding:
    """Threads that render and encode prompts. They are daemons: the process ends without waiting for them.

    Attributes:
        tokenizing: To be held while a tokenizer is used: they are not made for several threads.
    """

    def __init__(self) -> None:
        self.tokenizing = threading.Lock()
        self._free = asyncio.Semaphore(THREADS)
        self._began: dict[int, float] = {}
        self._numbers = itertools.count()

    @property
    def trouble(self) -> str:
        """What is stuck; '' where all is well."""
        seconds = time.monotonic() - min(self._began.values(), default=float('inf'))
        return f'encoding a prompt is stuck for {seconds:.0f} s' if seconds > STUCK_S else ''

    async def run(self, encode: Callable[[], T]) -> T:
        """Runs `encode` in a thread, which goes on to its end even if the client goes.

        Raises:
            Problem: status 503: too many threads were busy for `WAIT_S`.
        """
        try:
            await asyncio.wait_for(self._free.acquire(), WAIT_S)
        except asyncio.TimeoutError:
            raise APIError(503, f'prompts before this one took more than {WAIT_S:g} s to encode; try again later',
                          headers={'Retry-After': '5'}) from None  # fmt: skip
        number = next(self._numbers)
        self._began[number] = time.monotonic()
        found: Future[T] = Future()
        waiting = asyncio.wrap_future(found)

        def work() -> None:
            """The thread."""
            try:
                found.set_result(encode())
            except BaseException as error:  # a panic of a library in Rust is no Exception
                found.set_exception(error)

        def end(_: asyncio.Future[T]) -> None:
            """Lets the next one begin."""
            waiting.exception()  # retrieved, since nobody else may be there to do so
            del self._began[number]
            self._free.release()

        waiting.add_done_callback(end)
        threading.Thread(target=work, name='encoding', daemon=True).start()
        return await asyncio.shield(waiting)
