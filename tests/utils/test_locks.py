"""Locks on files: held against other processes, by their kind, and named."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xtuner.utils import locks
from xtuner.utils.locks import is_at, read_owner, try_lock, unlock, write_owner

pytestmark = pytest.mark.unit

TRY = """
import os, sys
from xtuner.utils.locks import try_lock
print(try_lock(os.open(sys.argv[1], os.O_RDWR), per_process=sys.argv[2] == 'True'))
"""


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def seen_by_another(path: Path, *, per_process: bool) -> str:
    command = [sys.executable, '-c', TRY, str(path), str(per_process)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize('per_process', [False, True])
def test_a_lock_keeps_another_process_out_until_it_is_closed(tmp_path: Path, per_process: bool) -> None:
    path = tmp_path / 'lock'
    with opened(path) as descriptor:
        assert try_lock(descriptor, per_process=per_process) == 'ours'
        assert seen_by_another(path, per_process=per_process) == 'taken'
    assert seen_by_another(path, per_process=per_process) == 'ours'


@pytest.mark.parametrize('per_process', [False, True])
def test_only_a_lock_per_process_is_not_held_by_a_fork(tmp_path: Path, per_process: bool) -> None:
    path = tmp_path / 'lock'
    ready, go = os.pipe()
    with opened(path) as descriptor:
        assert try_lock(descriptor, per_process=per_process) == 'ours'
        child = os.fork()
        if not child:
            os.close(go)
            os.read(ready, 1)  # until the parent closes its end
            os._exit(0)
    try:
        assert seen_by_another(path, per_process=per_process) == ('ours' if per_process else 'taken')
    finally:
        os.close(go)
        os.waitpid(child, 0)
        os.close(ready)


def test_unlock_frees_a_lock_that_a_fork_holds_too(tmp_path: Path) -> None:
    with opened(tmp_path / 'lock') as descriptor:
        assert try_lock(descriptor) == 'ours'
        copy = os.dup(descriptor)  # as a fork has
        unlock(descriptor)
        assert seen_by_another(tmp_path / 'lock', per_process=False) == 'ours'
        os.close(copy)


def test_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(38, 'Function not implemented')

    with opened(tmp_path / 'lock') as descriptor:
        monkeypatch.setattr(fcntl, 'flock', refuse)
        assert try_lock(descriptor) == 'no locks'
        unlock(descriptor)
        monkeypatch.setattr(locks, 'fcntl', None)  # Windows
        assert try_lock(descriptor, per_process=True) == 'no locks'
        unlock(descriptor)


def test_a_file_that_was_removed_or_replaced_is_not_at_its_path(tmp_path: Path) -> None:
    path = tmp_path / 'lock'
    with opened(path) as descriptor:
        assert is_at(descriptor, path)
        path.unlink()
        assert not is_at(descriptor, path)
        path.touch()
        assert not is_at(descriptor, path)


def test_the_owner_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'lock'
    assert read_owner(path) == ''
    path.write_text('process 1234567890 on a machine with a long name')
    with opened(path) as descriptor:
        write_owner(descriptor)
    assert read_owner(path).startswith(f'process {os.getpid()} on ')
    assert 'long' not in read_owner(path)
