from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import xtuner.dataset.cache.build_once as cache
from xtuner.dataset.cache.build_once import build_once, cache_root

pytestmark = pytest.mark.unit

FORK = multiprocessing.get_context('fork')


def complete(folder: Path) -> bool:
    return (folder / 'done').exists()


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / 'done').write_text(str(os.getpid()))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def slow_worker(folder: Path, log: Path) -> None:
    def build(to: Path) -> None:
        with log.open('a') as file:
            file.write('built\n')
        time.sleep(1.0)
        write(to)

    build_once(folder, build, is_complete=complete)
    assert complete(folder)


def started(target, *arguments) -> multiprocessing.Process:
    worker = FORK.Process(target=target, args=arguments, daemon=True)
    worker.start()
    return worker


def wait_for(condition, timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


def test_only_one_of_many_processes_builds(tmp_path):
    workers = [started(slow_worker, tmp_path / 'x', tmp_path / 'log') for _ in range(4)]
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / 'log').read_text() == 'built\n'
    assert names(tmp_path) == ['log', 'x', 'x.lock']


def test_an_interrupted_build_leaves_no_data_and_the_next_one_builds(tmp_path):
    def interrupted(folder: Path) -> None:
        folder.mkdir()
        (folder / 'half').write_text('')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / 'x', interrupted, is_complete=complete)
    assert names(tmp_path) == ['x.lock']
    assert build_once(tmp_path / 'x', write, is_complete=complete)
    assert not build_once(tmp_path / 'x', write, is_complete=complete)


def killed_worker(folder: Path) -> None:
    def build(to: Path) -> None:
        to.mkdir()
        os._exit(9)

    build_once(folder, build, is_complete=complete)


def test_what_a_killed_builder_left_is_taken_over_at_once_and_cleared(tmp_path):
    worker = started(killed_worker, tmp_path / 'x')
    worker.join(30)
    assert worker.exitcode == 9 and not complete(tmp_path / 'x')
    assert len(names(tmp_path)) == 2  # the lock and the part
    waited = []
    assert build_once(tmp_path / 'x', write, is_complete=complete, waiting=waited.append)
    assert waited == [] and names(tmp_path) == ['x', 'x.lock']


def test_a_lock_file_that_nobody_holds_is_free(tmp_path):
    """Of a machine that is gone, or of a process whose number another has now."""
    (tmp_path / 'x.lock').write_text(f'process {os.getpid()} on elsewhere')
    waited = []
    assert build_once(tmp_path / 'x', write, is_complete=complete, waiting=waited.append)
    assert waited == []


def held_until(folder: Path, go: Path, seen_as: int | None = None) -> None:
    if seen_as is not None:
        os.getpid = lambda: seen_as

    def build(to: Path) -> None:
        to.mkdir()
        (to.parent / 'building').touch()
        wait_for(go.exists)
        (to / 'done').write_text('first')

    assert build_once(folder, build, is_complete=complete)


def other(folder: Path) -> None:
    (folder.parent / 'other').touch()
    assert not build_once(folder, write, is_complete=complete)


@pytest.mark.parametrize('case', ['stopped for long', 'process id of another namespace'])
def test_a_builder_that_lives_is_waited_for(tmp_path, monkeypatch, case):
    monkeypatch.setattr(cache, '_STALE_S', 0.3, raising=False)  # of any rule by time, should there be one again
    gone = started(os.getpid)
    gone.join()
    builder = started(held_until, tmp_path / 'x', tmp_path / 'go', gone.pid if 'namespace' in case else None)
    wait_for((tmp_path / 'building').exists)
    if 'stopped' in case:
        os.kill(builder.pid, signal.SIGSTOP)
    waiter = started(other, tmp_path / 'x')
    wait_for((tmp_path / 'other').exists)
    time.sleep(1.0)
    assert not complete(tmp_path / 'x') and waiter.is_alive()
    os.kill(builder.pid, signal.SIGCONT)
    (tmp_path / 'go').touch()
    for worker in (builder, waiter):
        worker.join(30)
    assert (builder.exitcode, waiter.exitcode) == (0, 0)
    assert (tmp_path / 'x' / 'done').read_text() == 'first'


class Interleaved:
    """Runs functions as threads of which one goes on at a time, by one line of `cache.py`, as a seed says."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._turn = threading.Condition()
        self._alive: set[int] = set()
        self._next = -1

    def run(self, *functions) -> None:
        threads = [threading.Thread(target=self._run, args=(i, f), daemon=True) for i, f in enumerate(functions)]
        self._alive = set(range(len(threads)))
        self._next = self._random.randrange(len(threads))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not self._alive

    def _run(self, number: int, function) -> None:
        def trace(frame, event, _):
            if frame.f_code.co_filename != cache.__file__:
                return None
            self.step(number)
            return trace

        self._wait(number)
        sys.settrace(trace)
        try:
            function()
        finally:
            sys.settrace(None)
            with self._turn:
                self._alive.discard(number)
                self._choose()

    def step(self, number: int) -> None:
        with self._turn:
            self._choose()
        self._wait(number)

    def _choose(self) -> None:
        if self._alive:
            self._next = self._random.choice(sorted(self._alive))
            self._turn.notify_all()

    def _wait(self, number: int) -> None:
        with self._turn:
            assert self._turn.wait_for(lambda: self._next == number, 30)


def test_no_interleaving_lets_two_build_or_takes_what_one_builds(tmp_path, monkeypatch):
    """Three come upon the lock of a builder that died, and are stopped and go on between any two lines."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    gone = started(os.getpid)
    gone.join()
    for seed in range(60):
        folder = tmp_path / str(seed)
        (tmp_path / f'{seed}.lock').write_text(f'{cache.socket.gethostname()} {gone.pid}')
        builders: list[int] = []
        together, built = [], []
        order = Interleaved(seed)

        def come(number, folder=folder, builders=builders, together=together, built=built, order=order):
            def build(to: Path) -> None:
                builders.append(number)
                to.mkdir()
                for _ in range(10):
                    together.append(len(builders))
                    order.step(number)
                (to / 'done').touch()
                builders.remove(number)

            built.append(build_once(folder, build, is_complete=complete))

        order.run(*[lambda number=number: come(number) for number in range(3)])
        assert sorted(built) == [False, False, True], seed
        assert set(together) == {1}, seed


def test_without_locks_each_builds_for_itself_and_the_first_is_kept(tmp_path, monkeypatch):
    """A file system that keeps nobody out costs work, not the result."""

    def refuse(descriptor, operation):
        raise OSError(38, 'Function not implemented')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    builder = started(held_until_second, tmp_path / 'x', tmp_path / 'go')
    wait_for((tmp_path / 'building').exists)
    assert build_once(tmp_path / 'x', write, is_complete=complete)
    assert len(list(tmp_path.glob('x.part-*'))) == 1  # the other's, which lives
    (tmp_path / 'go').touch()
    builder.join(30)
    assert builder.exitcode == 0
    assert (tmp_path / 'x' / 'done').read_text() == str(os.getpid())
    assert names(tmp_path) == ['building', 'go', 'x', 'x.lock']


def held_until_second(folder: Path, go: Path) -> None:
    with pytest.raises(AssertionError):
        held_until(folder, go)
    assert complete(folder)


@pytest.mark.parametrize(('age_s', 'kept'), [(3600, True), (2 * 86400, False)])
def test_a_part_of_another_machine_is_cleared_when_nobody_has_written_it_for_a_day(tmp_path, age_s, kept):
    part = tmp_path / 'x.part-0123456789ab-0123456789ab'
    part.mkdir()
    (part / 'ids.bin').touch()
    for path in (part / 'ids.bin', part):
        os.utime(path, (time.time() - age_s,) * 2)
    assert build_once(tmp_path / 'x', write, is_complete=complete)
    assert part.exists() == kept


def test_a_torn_folder_is_replaced(tmp_path):
    (tmp_path / 'x').mkdir()
    assert build_once(tmp_path / 'x', write, is_complete=complete)
    assert complete(tmp_path / 'x')


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv('XTUNER_CACHE', str(tmp_path))
    assert cache_root() == tmp_path and cache_root('/a') == Path('/a')
    monkeypatch.delenv('XTUNER_CACHE')
    assert cache_root() == Path.home() / '.cache' / 'xtuner'
