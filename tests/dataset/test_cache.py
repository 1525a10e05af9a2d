from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

import xtuner.dataset.cache as cache
from xtuner.dataset.cache import build_once, cache_root


def complete(folder: Path) -> bool:
    return (folder / 'done').exists()


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / 'done').write_text(str(os.getpid()))


def slow_worker(folder: Path, log: Path) -> None:
    def build(to: Path) -> None:
        with log.open('a') as file:
            file.write('built\n')
        time.sleep(1.0)
        write(to)

    build_once(folder, build, is_complete=complete)
    assert complete(folder)


def test_only_one_of_many_processes_builds(tmp_path):
    context = multiprocessing.get_context('fork')
    workers = [context.Process(target=slow_worker, args=(tmp_path / 'x', tmp_path / 'log')) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / 'log').read_text() == 'built\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['log', 'x']


def test_an_interrupted_build_leaves_nothing_and_the_next_one_builds(tmp_path):
    def interrupted(folder: Path) -> None:
        folder.mkdir()
        (folder / 'half').write_text('')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / 'x', interrupted, is_complete=complete)
    assert list(tmp_path.iterdir()) == []
    assert build_once(tmp_path / 'x', write, is_complete=complete)
    assert not build_once(tmp_path / 'x', write, is_complete=complete)


def killed_worker(folder: Path) -> None:
    def build(to: Path) -> None:
        to.mkdir()
        os._exit(9)

    build_once(folder, build, is_complete=complete)


def test_what_a_killed_builder_left_is_taken_over_and_cleared(tmp_path):
    worker = multiprocessing.get_context('fork').Process(target=killed_worker, args=(tmp_path / 'x',))
    worker.start()
    worker.join(30)
    assert worker.exitcode == 9 and not complete(tmp_path / 'x')
    assert len(list(tmp_path.iterdir())) == 2  # the lock and the part
    assert build_once(tmp_path / 'x', write, is_complete=complete)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['x']


def test_a_silent_lock_of_another_machine_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, '_STALE_S', 0.5)
    (tmp_path / 'x.lock').write_text('elsewhere 1')
    waited = []
    assert build_once(tmp_path / 'x', write, is_complete=complete, waiting=lambda: waited.append(1))
    assert waited == [1]


def test_a_lock_stays_fresh_while_its_owner_works(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, '_BEAT_S', 0.05)

    def build(folder: Path) -> None:
        first = (tmp_path / 'x.lock').stat().st_mtime
        time.sleep(0.4)
        assert (tmp_path / 'x.lock').stat().st_mtime > first
        write(folder)

    assert build_once(tmp_path / 'x', build, is_complete=complete)


def test_a_torn_folder_is_replaced(tmp_path):
    (tmp_path / 'x').mkdir()
    assert build_once(tmp_path / 'x', write, is_complete=complete)
    assert complete(tmp_path / 'x')


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv('XTUNER_CACHE', str(tmp_path))
    assert cache_root() == tmp_path and cache_root('/a') == Path('/a')
    monkeypatch.delenv('XTUNER_CACHE')
    assert cache_root() == Path.home() / '.cache' / 'xtuner'


@pytest.mark.parametrize('jump_s', [-86400, 86400])
def test_a_clock_that_jumps_does_not_bury_a_builder_that_lives(tmp_path, monkeypatch, jump_s):
    """A lock's stamp is of another clock than ours, as after a correction of one of them."""
    lock = tmp_path / 'x.lock'
    lock.write_text(f'elsewhere {os.getpid()}')
    silence = cache._Silence(lock)
    assert not cache._is_dead(lock, silence)
    now = time.time()
    os.utime(lock, (now + jump_s, now + jump_s))
    assert not cache._is_dead(lock, silence)
    monkeypatch.setattr(time, 'time', lambda: now - jump_s)
    assert not cache._is_dead(lock, silence)
