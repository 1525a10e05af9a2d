"""Encodes prompts in threads, so that a slow chat template blocks neither the event loop nor other requests."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from xtuner.serve.problems import APIError

THREADS = 32  # more than can wait for a worker of `xtuner.dataset.templates.worker_pool`
WAIT_S = 30.0  # maximum seconds that a request waits for a thread
STUCK_S = 120.0  # seconds after which an encoding counts as stuck

T = TypeVar('T')


class Encoding:
    """Threads that render and encode prompts. They are daemons: the process exits without waiting for them.

    Attributes:
        tokenizing: Lock to hold while a tokenizer is used; tokenizers are not thread-safe.
    """

    def __init__(self) -> None:
        self.tokenizing = threading.Lock()
        self._free_threads = asyncio.Semaphore(THREADS)
        self._start_times: dict[int, float] = {}
        self._numbers = itertools.count()

    @property
    def failure(self) -> str:
        """The reason if an encoding is stuck, otherwise ''."""
        seconds = time.monotonic() - min(self._start_times.values(), default=float('inf'))
        return f'encoding a prompt has been stuck for {seconds:.0f} s' if seconds > STUCK_S else ''

    async def run(self, encode: Callable[[], T]) -> T:
        """Runs `encode` in a thread, which finishes even if the client disconnects.

        Raises:
            APIError: status 503: all threads were busy for `WAIT_S`.
        """
        try:
            await asyncio.wait_for(self._free_threads.acquire(), WAIT_S)
        except asyncio.TimeoutError:
            raise APIError(503, f'encoding earlier prompts took more than {WAIT_S:g} s; try again later',
                          headers={'Retry-After': '5'}) from None  # fmt: skip
        number = next(self._numbers)
        self._start_times[number] = time.monotonic()
        future: Future[T] = Future()
        result = asyncio.wrap_future(future)

        def work() -> None:
            """Runs in the thread."""
            try:
                future.set_result(encode())
            except BaseException as error:  # a Rust panic is not an Exception
                future.set_exception(error)

        def end(_: asyncio.Future[T]) -> None:
            """Releases the thread."""
            result.exception()  # marks it as retrieved, because the waiting request may be gone
            del self._start_times[number]
            self._free_threads.release()

        result.add_done_callback(end)
        threading.Thread(target=work, name='encoding', daemon=True).start()
        return await asyncio.shield(result)
