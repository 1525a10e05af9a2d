"""Pool of worker processes that render chat templates, with limits on concurrent quick and slow renderings.

A worker ends when its standard input is closed, hence with its parent process, however that ends. A forked child
closes its copies of the pipes and starts its own workers.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEMORY = 512 * 2**20  # address space of a worker in bytes
QUICK = 0.05  # CPU seconds after which a rendering counts as slow
_QUICK_SLOTS = 4
_SLOW_SLOTS = max(1, min(2, (os.cpu_count() or 1) // 2))
_MAX_WAITING = 8  # callers that may wait for a slow slot; further ones are rejected
_START_SECONDS = 60  # generous, for a busy machine
_MAX_FRAME = 2**28  # bytes of an answer; the output limit is lower
_SCRIPT = Path(__file__).with_name('template_worker.py')
_ENVIRONMENT = ('TZ', 'LD_LIBRARY_PATH', 'SYSTEMROOT')  # environment variables that Python itself may need


class Died(Exception):
    """A worker ended, or was killed, before it answered: `reason` is 'time', 'crash' or 'start'."""

    def __init__(self, reason: str, detail: str = '') -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class _Evicted(Exception):
    """A rendering is slow and all slow slots are taken."""


class Worker:
    """One worker process and the two pipes to it; `busy` while an answer is outstanding."""

    def __init__(self) -> None:
        folders = {str(Path(spec.origin).parent.parent) for name in ('jinja2', 'markupsafe')
                   if (spec := importlib.util.find_spec(name)) and spec.origin}  # fmt: skip
        command = [sys.executable, '-I', '-S', '-X', 'utf8', str(_SCRIPT), json.dumps({'memory': MEMORY}), *folders]
        self.process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=os.sep,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self._sink, self._source = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._sink, False)
        os.set_blocking(self._source, False)
        self._read = bytearray()
        self._started = False
        self.busy = True

    def send(self, frames: Sequence[bytes]) -> None:
        """Writes frames; raises Died if the process does not accept them."""
        if not self._started:
            if self.receive(_START_SECONDS) is None:
                raise Died('start', f'no answer within {_START_SECONDS} s')
            self._started = True
        content = memoryview(b''.join(struct.pack('>I', len(frame)) + frame for frame in frames))
        until = time.monotonic() + _START_SECONDS
        while content:
            try:
                content = content[os.write(self._sink, content) :]
            except BlockingIOError:
                self._wait(self._sink, select.POLLOUT, until - time.monotonic())
                if time.monotonic() > until:
                    raise Died('crash', 'it does not read its input') from None
            except OSError:
                raise self._died() from None

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Reads one answer; returns None if it does not arrive in time.

        Raises:
            Died: The process ended.
        """
        until = time.monotonic() + seconds
        while (frame := self._frame()) is None:
            if not self._wait(self._source, select.POLLIN, until - time.monotonic()):
                return None
            with contextlib.suppress(BlockingIOError):
                content = os.read(self._source, 2**20)
                if not content:
                    raise self._died()
                self._read += content
        answer = json.loads(frame.decode('utf-8', 'surrogatepass'))
        assert isinstance(answer, dict)
        return answer

    def receive_quick(self, seconds: float) -> dict[str, Any] | None:
        """Reads one answer; returns None if it takes more than `QUICK` CPU seconds, or `seconds` of wall time."""
        began, until = self._cpu_seconds(), time.monotonic() + seconds
        while (answer := self.receive(QUICK)) is None:
            if self._cpu_seconds() - began >= QUICK or time.monotonic() > until:
                return None
        return answer

    def _cpu_seconds(self) -> float:
        """CPU seconds used by the process; wall time where there is no /proc."""
        try:
            ticks = Path(f'/proc/{self.process.pid}/stat').read_text(encoding='utf-8').rpartition(')')[2].split()[11:13]
        except OSError:
            return time.monotonic()
        return sum(map(int, ticks)) / os.sysconf('SC_CLK_TCK')

    def end(self) -> None:
        """Kills and reaps the process."""
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Closes the pipes; a forked child of the parent process needs to do nothing else."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
        if self.process.returncode is None:
            self.process.returncode = 0  # not this process's child

    def _frame(self) -> bytes | None:
        if len(self._read) < 4:
            return None
        size = struct.unpack_from('>I', self._read)[0]
        if size > _MAX_FRAME:
            raise Died('crash', f'an answer of {size} bytes')
        if len(self._read) < 4 + size:
            return None
        frame = bytes(self._read[4 : 4 + size])
        del self._read[: 4 + size]
        return frame

    def _wait(self, pipe: int, event: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(pipe, event)
        return bool(poll.poll(max(0, seconds) * 1000))

    def _died(self) -> Died:
        try:
            status = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return Died('crash', 'it closed its output')
        if status == -signal.SIGPROF:
            return Died('time')
        if not self._started:
            return Died('start', f'exit status {status}')
        return Died('crash', f'signal {-status}' if status < 0 else f'exit status {status}')


class Pool:
    """Pool of idle workers, with slots for callers: many quick renderings at a time, few slow ones."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._workers: set[Worker] = set()
        self._idle: list[Worker] = []
        self._quick = threading.Semaphore(_QUICK_SLOTS)
        self._slow = threading.Semaphore(_SLOW_SLOTS)
        self._waiting = threading.Semaphore(_MAX_WAITING)

    def run(self, head: dict[str, Any], frames: Sequence[bytes], seconds: Sequence[float]) -> list[dict[str, Any]]:
        """Renders frames in order.

        Args:
            head: The part of the request that is common to all frames.
            frames: One frame per job.
            seconds: Wall time limit of each job.

        Returns:
            The answers, up to the first one that cost its process. A missing answer is
            `{'error': reason, 'message': detail}`.
        """
        answers: list[dict[str, Any]] = []
        retried = False  # a crashed process may have been killed from outside
        with _Slot(self._quick, self._slow, self._waiting) as slot:
            while len(answers) < len(frames):
                try:
                    worker = self._take()
                except OSError as error:
                    return [*answers, {'error': 'start', 'message': error.strerror or str(error)}]
                done, evicted = len(answers), False
                try:
                    self._fill(answers, worker, slot, head, frames, seconds)
                    break
                except _Evicted:
                    evicted = True
                except Died as died:
                    retried = died.reason == 'crash' and (not retried or len(answers) > done)
                    if not retried:
                        return [*answers, {'error': died.reason, 'message': died.detail}]
                finally:
                    self._give_back(worker)  # kills a busy worker before waiting for anything else
                if evicted and not slot.wait():
                    return [*answers, {'error': 'busy'}]
        return answers

    def close(self) -> None:
        """Ends all workers."""
        with self.lock:
            for worker in self._workers:
                worker.end()
            self._workers, self._idle = set(), []

    def reset_after_fork(self) -> None:
        """In a forked child: leaves the workers to the parent and starts with an empty pool."""
        for worker in self._workers:
            worker.close()
        self.__init__()  # type: ignore[misc]  # also resets locks held by threads of the parent

    def _fill(
        self,
        answers: list[dict[str, Any]],
        worker: Worker,
        slot: _Slot,
        head: dict[str, Any],
        frames: Sequence[bytes],
        seconds: Sequence[float],
    ) -> None:
        """Adds answers until all are there or the worker has to be replaced."""
        done = len(answers)
        worker.busy = True
        worker.send([json.dumps({**head, 'count': len(frames) - done}).encode(), *frames[done:]])
        for wall_limit in seconds[done:]:
            answer = worker.receive(wall_limit) if slot.slow else worker.receive_quick(wall_limit)
            if answer is None and not slot.slow:
                if not slot.move_to_slow():
                    raise _Evicted
                answer = worker.receive(wall_limit)
            if answer is None:
                raise Died('time')
            answers.append(answer)
            if answer.get('error') == 'memory':
                return
        worker.busy = False

    def _take(self) -> Worker:
        with self.lock:  # prevents a fork while a worker starts: the child would keep its pipes open
            if self._idle:
                return self._idle.pop()
            worker = Worker()
            self._workers.add(worker)
            return worker

    def _give_back(self, worker: Worker) -> None:
        """Returns an idle worker to the pool; kills a busy one."""
        with self.lock:
            if not worker.busy and worker in self._workers:
                self._idle.append(worker)
                return
            self._workers.discard(worker)
        worker.end()


class _Slot:
    """A caller's slot: a quick one at first, later possibly a slow one."""

    def __init__(self, quick: threading.Semaphore, slow: threading.Semaphore, waiting: threading.Semaphore) -> None:
        self._quick, self._slow, self._waiting = quick, slow, waiting
        self._held: threading.Semaphore | None = None

    @property
    def slow(self) -> bool:
        return self._held is self._slow

    def __enter__(self) -> _Slot:
        self._quick.acquire()
        self._held = self._quick
        return self

    def __exit__(self, *_: object) -> None:
        self._move(None)

    def move_to_slow(self) -> bool:
        """Moves to a slow slot if one is free."""
        if not self._slow.acquire(blocking=False):
            return False
        self._move(self._slow)
        return True

    def wait(self) -> bool:
        """Moves to a slow slot, waiting for one; returns False if too many callers wait already."""
        if not self._waiting.acquire(blocking=False):
            return False
        try:
            self._move(None)
            self._slow.acquire()
            self._held = self._slow
        finally:
            self._waiting.release()
        return True

    def _move(self, to: threading.Semaphore | None) -> None:
        held, self._held = self._held, to
        if held is not None:
            held.release()


POOL = Pool()
atexit.register(POOL.close)
if hasattr(os, 'register_at_fork'):  # not on Windows
    os.register_at_fork(before=lambda: POOL.lock.acquire(), after_in_parent=lambda: POOL.lock.release(),
                        after_in_child=POOL.reset_after_fork)  # fmt: skip
