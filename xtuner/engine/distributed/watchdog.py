"""Watchdog of the ranks: one that fails, dies or hangs ends all within seconds, with one line that says which and why.

Every rank runs a thread that asks the group's store once a second whether another rank has failed, checks whether the
processes of its neighbours on the node are alive, and detects when its own rank has made no progress for too long. The
rank that claims the failure first reports it; all others end silently. It works under torchrun, Slurm and `xtuner
train`, and while the main thread is blocked in a collective.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from typing import Any

from torch import distributed

from xtuner import ranks
from xtuner.errors import TrainingError, first_few
from xtuner.utils.escape import printable
from xtuner.utils.processes import has_ended, is_visible, this_process

logger = logging.getLogger('xtuner')

_BEAT_S = 1.0
_LINGER_S = 2.0  # the reporting rank must end first, since launchers look at the first one
_REPORT_S = 30.0  # interval of messages about the ranks that are waited for
_PATIENCE_S = 10.0  # for ranks that may be in a collective that cannot end without this one
_CLAIM, _STATUS = 'xtuner/failed', 1
_STEPS_AGREED = 'xtuner/going on'


class Watchdog:
    """Watches a group of ranks from `start` to `stop`.

    Args:
        store: The group's store; its `clone` is a separate connection.
        rank: Rank of this process.
        world_size: Number of processes.
        timeout_s: A rank without progress for this long has hung.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float) -> None:
        self._store = store.clone()
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._place = 'starting'
        self._since: float | None = None  # None: not in a timed part of the run
        self._count = self._outcomes = 0
        self._passed = 0  # number of agreements to continue
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name='watch', daemon=True)
        self._neighbours: dict[int, str] | None = None

    def start(self) -> None:
        """Registers this rank and starts watching; from now on the watchdog decides which rank reports an error."""
        self._store.set(f'xtuner/process/{self._rank}', json.dumps([socket.gethostname(), this_process()]))
        ranks.error_arbiter = self.report_failure
        self._thread.start()

    def stop(self) -> None:
        """Marks this rank as finished, so that its end is not a failure."""
        self._store.set(f'xtuner/ended/{self._rank}', '1')
        self._ended.set()
        self._thread.join()
        ranks.error_arbiter = None
        self._store.add('xtuner/ended', 1)
        latest = time.monotonic() + _REPORT_S
        # The process of rank 0 may host the store.
        while self._rank == 0 and self._store.add('xtuner/ended', 0) < self._world_size:
            if time.monotonic() > latest:
                break
            time.sleep(0.02)

    def heartbeat(self, place: str) -> None:
        """Records where this rank is, such as 'step 5, backward'; restarts the time-out."""
        self._count += 1
        self._place, self._since = place, time.monotonic()
        self._store.set(f'xtuner/place/{self._rank}', f'{self._count} {place}')

    def on_bucket(self) -> None:
        """Heartbeat at a gradient bucket."""
        self.heartbeat(f'{self._place.partition(", ")[0]}, adding up gradients')

    def suspend(self) -> None:
        """Suspends the time-out, while this rank writes a checkpoint or generates a sample."""
        self._since = None

    def gather(self, what: str) -> None:
        """A barrier through the store, which cannot time out."""
        self._store.set(f'xtuner/{what}/{self._rank}', '1')
        self._store.add(f'xtuner/{what}', 1)
        began = reported = time.monotonic()
        while self._store.add(f'xtuner/{what}', 0) < self._world_size:
            time.sleep(0.05)
            if time.monotonic() - reported > _REPORT_S:
                reported = time.monotonic()
                missing = [r for r in range(self._world_size) if not self._store.check([f'xtuner/{what}/{r}'])]
                logger.info('waiting for %s of rank %s for %.0f s', what, first_few(missing, 4), reported - began)

    def agree_on_stop(self, asked: int | None) -> int | None:
        """Agrees with all ranks whether to continue; called at the same points, so that all stop at the same one.

        The store holds how many times the foremost rank has continued, 'N', or once a rank asks to stop, 'N SIGNAL':
        all ranks continue N times in total and then stop. The first to change it decides; no rank waits.

        Args:
            asked: The signal received by this rank; None: none.

        Returns:
            The signal to stop for; None: continue.
        """
        passed, foremost = self._passed, self._passed
        self._passed += 1
        while True:
            before = str(foremost) if foremost else ''
            wanted = f'{foremost + 1}' if asked is None else f'{foremost} {asked}'
            num, _, signal_number = self._store.compare_set(_STEPS_AGREED, before, wanted).decode().partition(' ')
            if signal_number:
                return int(signal_number) if passed >= int(num) else None
            if asked is None:
                return None
            foremost = int(num)  # another rank has continued meanwhile: stop where it is

    def agree_on_success(self, what: str, error: str) -> None:
        """Called by every rank after a joint operation; returns if all succeeded or all failed alike.

        Args:
            what: The operation, for the message.
            error: This rank's error; '' for none.

        Raises:
            TrainingError: Some ranks failed and others did not, or wait in a collective for this rank, which failed.
        """
        self._outcomes += 1
        keys = [f'xtuner/outcome/{self._outcomes}/{rank}' for rank in range(self._world_size)]
        self._store.set(keys[self._rank], error)
        latest = time.monotonic() + _PATIENCE_S
        while not self._store.check(keys):
            if error and time.monotonic() > latest:
                raise TrainingError(f'only rank {self._rank} failed in {what}: {error}')
            time.sleep(0.02)
        errors = [self._store.get(key).decode() for key in keys]
        self._store.delete_key(f'xtuner/outcome/{self._outcomes - 2}/{self._rank}')  # all ranks have read that one
        if len(set(errors)) > 1:
            rank, text = next((rank, text) for rank, text in enumerate(errors) if text)
            raise TrainingError(f'rank {rank} failed in {what}, but not all others did: {text}')

    def report_failure(self, text: str) -> bool:
        """Whether this process is the first to fail and should report its error on one line."""
        if _is_consequence(text):  # probably of a rank that died, which its neighbours are about to detect
            self._ended.wait(3 * _BEAT_S)
        return self._claim(text)

    def _claim(self, text: str) -> bool:
        mine = f'{self._rank} {text}'
        try:
            return self._store.compare_set(_CLAIM, '', mine).decode() == mine
        except RuntimeError:  # the store ended with rank 0 or its launcher
            return False

    def _run(self) -> None:
        try:
            while not self._ended.wait(_BEAT_S):
                self._poll()
        except RuntimeError as error:  # no store: rank 0 or the launcher has ended
            if not self._ended.is_set():
                logger.warning('rank %d ends, it lost the connection to the others: %s', self._rank, error)
                time.sleep(_LINGER_S)
                self._end(None)

    def _poll(self) -> None:
        if self._store.check([_CLAIM]):
            time.sleep(_LINGER_S)
            self._end(None)
        dead = self._dead_neighbour()
        if dead is not None:
            self._end(f'rank {dead} was killed, possibly out of host memory (see `dmesg`); the last checkpoint is kept')
        since = self._since
        if since is not None and time.monotonic() - since > self._timeout_s:
            self._end(self._hang_message())

    def _dead_neighbour(self) -> int | None:
        """A rank of this node whose process has died without finishing."""
        if self._neighbours is None:
            self._neighbours = self._find_neighbours()
        for rank, process in (self._neighbours or {}).items():
            if has_ended(process) and not self._store.check([f'xtuner/ended/{rank}']):
                return rank
        return None

    def _find_neighbours(self) -> dict[int, str] | None:
        """The other processes visible from here; None: not all have registered yet."""
        keys = [f'xtuner/process/{rank}' for rank in range(self._world_size)]
        if not self._store.check(keys):
            return None
        processes = {rank: json.loads(self._store.get(key))[1] for rank, key in enumerate(keys)}
        return {rank: process for rank, process in processes.items() if rank != self._rank and is_visible(process)}

    def _hang_message(self) -> str:
        """Names the ranks that are behind the others, their positions, and their machine."""
        places: dict[int, tuple[int, str]] = {}
        for rank in range(self._world_size):
            key = f'xtuner/place/{rank}'
            count, _, place = (
                self._store.get(key).decode().partition(' ') if self._store.check([key]) else ('0', '', '')
            )
            places[rank] = (int(count), place or 'starting')
        least = min(count for count, _ in places.values())
        behind = [rank for rank, (count, _) in places.items() if count == least]
        seconds = f'{self._timeout_s:g} s'
        if len(behind) == self._world_size:
            return f'no rank has made progress for {seconds}: all are at {places[0][1]}; see `parallel.timeout_s`'
        host = json.loads(self._store.get(f'xtuner/process/{behind[0]}'))[0]
        return (
            f'rank {first_few(behind, 4)} (on {host}) hangs at {places[behind[0]][1]}: the others have waited for '
            f'{seconds}; if it is only slow, set `parallel.timeout_s`'
        )

    def _end(self, text: str | None) -> None:
        """Ends this process, reporting why if it is the first; exceptions cannot reach a thread in a collective."""
        if self._ended.is_set():
            return
        if text is not None and self._claim(text):
            if '--debug' in sys.argv:
                faulthandler.dump_traceback(all_threads=True)
            ranks.error_arbiter = lambda _: True
            if ranks.should_report(text):
                print(f'xtuner: error: {printable(text)}', file=sys.stderr, flush=True)
            os._exit(TrainingError.exit_status)
        if text is not None:  # another was first
            time.sleep(_LINGER_S)
        sys.stderr.flush()
        os._exit(_STATUS)


def _is_consequence(text: str) -> bool:
    """Whether an error's text is that of a collective that lost a rank."""
    words = ('gloo', 'nccl', 'connection closed by peer', 'connection reset', 'timed out waiting', 'distbackenderror',
             'distnetworkerror')  # fmt: skip
    return any(word in text.lower() for word in words)


def start_watchdog(rank: int, world_size: int, timeout_s: float) -> Watchdog | None:
    """Creates and starts a watchdog of the default group; None for a single process."""
    if world_size == 1:
        return None
    watch = Watchdog(distributed.distributed_c10d._get_default_store(), rank, world_size, timeout_s)
    watch.start()
    return watch
