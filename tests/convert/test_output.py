"""A folder that appears as a whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.convert.test_shards import PLANS, write
from xtuner.convert.output import atomic_folder
from xtuner.errors import CheckpointError, ModelError
from xtuner.utils import locks


def test_where_the_disk_refuses_the_work_is_kept_and_where_the_input_is_wrong_it_is_not(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    with (
        pytest.raises(ModelError, match=r'no space left.*the same command resumes it'),
        atomic_folder(out, 1) as folder,
    ):
        write(folder, PLANS, stop_at='d')
    assert [p.name for p in (tmp_path / '.partial-out').glob('*.safetensors')] == ['model-00001-of-00003.safetensors']
    with pytest.raises(CheckpointError), atomic_folder(out, 1):
        raise CheckpointError('wrong')
    assert not list(tmp_path.iterdir())


def test_another_job_does_not_go_on_with_it(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    with pytest.raises(ModelError), atomic_folder(out, 'fp16') as folder:
        write(folder, PLANS, stop_at='d')
    with atomic_folder(out, 'bf16') as folder:
        assert not list(folder.glob('*.safetensors'))
        write(folder, PLANS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out']


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    with atomic_folder(out, 'job') as folder:
        (folder / 'half').write_text('done')
        with pytest.raises(ModelError, match='out is being written by another process'), atomic_folder(out, 'job'):
            pass
        assert (folder / 'half').read_text() == 'done'
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    assert (out / 'half').read_text() == 'done'


def test_the_lock_is_closed_before_it_is_removed_where_open_files_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def unlink_as_windows(path: Path, missing_ok: bool = False) -> None:
        links = list(Path('/proc/self/fd').iterdir())
        if any(os.path.realpath(link) == str(path) for link in links):
            raise PermissionError(13, 'in use', str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(locks, 'fcntl', None)
    monkeypatch.setattr(Path, 'unlink', unlink_as_windows)
    with atomic_folder(tmp_path / 'out', 'job') as folder:
        (folder / 'file').write_text('done')
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_where_nothing_can_be_written_nothing_is_said_to_be_kept(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    below = atomic_folder(tmp_path / 'file' / 'a', 'job')
    with pytest.raises(ModelError, match=r'file is a file; nothing was written'), below:
        pass
    with (
        pytest.raises(ModelError, match=r'cannot write .*: .*; nothing was written$'),
        atomic_folder(Path('/proc/self/nothing/out'), 'job'),
    ):
        pass
