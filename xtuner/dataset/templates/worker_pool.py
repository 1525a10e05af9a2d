"""The processes in which chat templates are rendered, and who may use how many of them at a time.

A process ends when its standard input does: with the process that started it, however that ends. A fork of that
process closes its copies and starts processes of its own.
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

MEMORY = 512 * 2**20  # bytes of address space of a process
QUICK = 0.05  # seconds of processor time after which an answer counts as slow
_QUICK_PLACES = 4
_SLOW_PLACES = max(1, min(2, (os.cpu_count() or 1) // 2))
_MOST_WAITING = 8  # callers that wait for a place among the slow ones; more are sent away
_START_SECONDS = 60  # on a machine with much else to do
_MOST_FRAME = 2**28  # bytes of an answer; what may be rendered is less
_SCRIPT = Path(__file__).with_name('template_worker.py')
_KEPT = ('TZ', 'LD_LIBRARY_PATH', 'SYSTEMROOT')  # what Python itself may need of the environment


class Died(Exception):
    """A process ended, or was ended, before it answered: `reason` is 'time', 'crash' or 'start'."""

    def __init__(self, reason: str, detail: str = '') -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class _Evicted(Exception):
    """An answer is slow, and all places for slow ones are taken."""


class Worker:
    """One process, and the two pipes to it; `busy` while an answer is owed."""

    def __init__(self) -> None:
        folders = {str(Path(spec.origin).parent.parent) for name in ('jinja2', 'markupsafe')
                   if (spec := importlib.util.find_spec(name)) and spec.origin}  # fmt: skip
        command = [sys.executable, '-I', '-S', '-X', 'utf8', str(_SCRIPT), json.dumps({'memory': MEMORY}), *folders]
        self.process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=os.sep,
            env={name: os.environ[name] for name in _KEPT if name in os.environ}, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self._sink, self._source = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._sink, False)
        os.set_blocking(self._source, False)
        self._read = bytearray()
        self._started = False
        self.busy = True

    def send(self, frames: Sequence[bytes]) -> None:
        """Writes frames; raises Died where the process takes none."""
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
                    raise Died('crash', 'it does not read') from None
            except OSError:
                raise self._died() from None

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Reads one answer; None where it does not come in time.

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
        """Reads one answer; None where it takes more than `QUICK` of processor time, or `seconds` by the clock."""
        began, until = self._used(), time.monotonic() + seconds
        while (answer := self.receive(QUICK)) is None:
            if self._used() - began >= QUICK or time.monotonic() > until:
                return None
        return answer

    def _used(self) -> float:
        """Seconds of processor time; of the clock where there is no /proc."""
        try:
            ticks = Path(f'/proc/{self.process.pid}/stat').read_text(encoding='utf-8').rpartition(')')[2].split()[11:13]
        except OSError:
            return time.monotonic()
        return sum(map(int, ticks)) / os.sysconf('SC_CLK_TCK')

    def end(self) -> None:
        """Kills and reaps the process; nothing of it is left after this."""
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Closes the pipes; in a fork of the process that started it, this is all there is to do."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
        if self.process.returncode is None:
            self.process.returncode = 0  # not ours to wait for

    def _frame(self) -> bytes | None:
        if len(self._read) < 4:
            return None
        size = struct.unpack_from('>I', self._read)[0]
        if size > _MOST_FRAME:
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
    """Processes that wait for work, and places for callers: many quick answers at a time, few slow ones."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._workers: set[Worker] = set()
        self._idle: list[Worker] = []
        self._quick = threading.Semaphore(_QUICK_PLACES)
        self._slow = threading.Semaphore(_SLOW_PLACES)
        self._waiting = threading.Semaphore(_MOST_WAITING)

    def run(self, head: dict[str, Any], frames: Sequence[bytes], seconds: Sequence[float]) -> list[dict[str, Any]]:
        """Has frames answered, in order.

        Args:
            head: What holds for all of them.
            frames: One a job.
            seconds: How long each may take by the clock.

        Returns:
            The answers, up to the first one that cost its process. One that did not come at all is
            `{'error': reason, 'message': detail}`.
        """
        answers: list[dict[str, Any]] = []
        retried = False  # a process that crashed may have been ended by somebody else
        with _Place(self._quick, self._slow, self._waiting) as place:
            while len(answers) < len(frames):
                try:
                    worker = self._take()
                except OSError as error:
                    return [*answers, {'error': 'start', 'message': error.strerror or str(error)}]
                done, evicted = len(answers), False
                try:
                    self._fill(answers, worker, place, head, frames, seconds)
                    break
                except _Evicted:
                    evicted = True
                except Died as died:
                    retried = died.reason == 'crash' and (not retried or len(answers) > done)
                    if not retried:
                        return [*answers, {'error': died.reason, 'message': died.detail}]
                finally:
                    self._give_back(worker)  # which ends one that owes an answer, before anything else is waited for
                if evicted and not place.wait():
                    return [*answers, {'error': 'busy'}]
        return answers

    def close(self) -> None:
        """Ends all processes."""
        with self.lock:
            for worker in self._workers:
                worker.end()
            self._workers, self._idle = set(), []

    def forget(self) -> None:
        """In a fork: leaves the processes to the one that started them, and begins anew."""
        for worker in self._workers:
            worker.close()
        self.__init__()  # type: ignore[misc]  # also the locks, which threads that are not here may have held

    def _fill(
        self,
        answers: list[dict[str, Any]],
        worker: Worker,
        place: _Place,
        head: dict[str, Any],
        frames: Sequence[bytes],
        seconds: Sequence[float],
    ) -> None:
        """Adds answers until none is missing or the process has to be replaced."""
        done = len(answers)
        worker.busy = True
        worker.send([json.dumps({**head, 'count': len(frames) - done}).encode(), *frames[done:]])
        for patience in seconds[done:]:
            answer = worker.receive(patience) if place.slow else worker.receive_quick(patience)
            if answer is None and not place.slow:
                if not place.leave():
                    raise _Evicted
                answer = worker.receive(patience)
            if answer is None:
                raise Died('time')
            answers.append(answer)
            if answer.get('error') == 'memory':
                return
        worker.busy = False

    def _take(self) -> Worker:
        with self.lock:  # nobody forks while a process is started: the fork would keep its pipes open
            if self._idle:
                return self._idle.pop()
            worker = Worker()
            self._workers.add(worker)
            return worker

    def _give_back(self, worker: Worker) -> None:
        """Keeps a process that has answered everything; ends one that has not."""
        with self.lock:
            if not worker.busy and worker in self._workers:
                self._idle.append(worker)
                return
            self._workers.discard(worker)
        worker.end()


class _Place:
    """A caller's place: among the quick ones at first, later perhaps among the slow ones."""

    def __init__(self, quick: threading.Semaphore, slow: threading.Semaphore, waiting: threading.Semaphore) -> None:
        self._quick, self._slow, self._waiting = quick, slow, waiting
        self._held: threading.Semaphore | None = None

    @property
    def slow(self) -> bool:
        return self._held is self._slow

    def __enter__(self) -> _Place:
        self._quick.acquire()
        self._held = self._quick
        return self

    def __exit__(self, *_: object) -> None:
        self._move(None)

    def leave(self) -> bool:
        """Goes to the slow ones where a place is free there."""
        if not self._slow.acquire(blocking=False):
            return False
        self._move(self._slow)
        return True

    def wait(self) -> bool:
        """Goes to the slow ones, waiting for a place there; False where too many wait already."""
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
                        after_in_child=POOL.forget)  # fmt: skip
