"""One run at a time in a work folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xtuner.engine.checkpoint import run_lock
from xtuner.engine.checkpoint.run_lock import LOCK_FILE, exclusive_run_dir
from xtuner.errors import CheckpointError

pytestmark = pytest.mark.unit

HOLD = """
import fcntl, sys
file = open(sys.argv[1], 'w')
fcntl.lockf(file, fcntl.LOCK_EX)
print('process 7 on elsewhere', file=file, flush=True)
print('held', flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another(work_dir: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, '-c', HOLD, str(work_dir / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == 'held\n'
        try:
            yield process
        finally:
            process.kill()


def test_a_second_run_is_refused_and_the_first_one_left_alone(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as other:
        for _ in range(2):
            with (
                pytest.raises(CheckpointError, match=r'another run is active there \(process 7 on elsewhere\)'),
                exclusive_run_dir(tmp_path),
            ):
                pytest.fail('let in')
        other.kill()
        other.wait()
        with exclusive_run_dir(tmp_path):  # a lock ends with its process, however that ends
            assert 'process' in (tmp_path / LOCK_FILE).read_text(encoding='utf-8')
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run before may end, and remove its file, between our opening and our locking it."""
    lock, locked = run_lock._lock, []

    def late(descriptor: int, path: Path) -> None:
        lock(descriptor, path)
        locked.append(path)
        if len(locked) == 1:
            path.unlink()

    monkeypatch.setattr(run_lock, '_lock', late)
    with exclusive_run_dir(tmp_path):
        assert (tmp_path / LOCK_FILE).is_file()
    assert len(locked) == 2


def test_what_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), exclusive_run_dir(tmp_path / 'a' / 'b'):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with exclusive_run_dir(tmp_path / 'a' / 'b'):
        (tmp_path / 'a' / 'b' / 'checkpoint').mkdir()
    assert [p.name for p in (tmp_path / 'a' / 'b').iterdir()] == ['checkpoint']


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    for place in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(CheckpointError, match=f'cannot write to {place}: .*; choose another --work-dir'):
            exclusive_run_dir(place).__enter__()


@pytest.mark.skipif(sys.platform == 'win32', reason='folders are not closed there in this way')
def test_below_a_folder_that_may_not_be_looked_into(tmp_path: Path) -> None:
    (tmp_path / 'closed').mkdir(mode=0)
    root = os.geteuid() == 0  # for whom nothing is closed
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(CheckpointError, match=r'cannot write to .*: Permission denied; choose another --work-dir'):
            exclusive_run_dir(tmp_path / 'closed' / 'a').__enter__()
    finally:
        if root:
            os.seteuid(0)
