"""Checkpoints: whole or not there, altered ones recognised, nothing in them executed."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from xtuner.engine.checkpoint import store
from xtuner.engine.checkpoint.store import (
    clear_leftovers,
    list_checkpoints,
    newest_checkpoint,
    recover,
    step_of,
    verify_checkpoint,
    write_checkpoint,
)
from xtuner.engine.checkpoint.trainer_state import VALIDATION_LOSS
from xtuner.errors import CheckpointError
from xtuner.utils import files as file_utils

STATE: dict[str, Any] = {
    'step': 3,
    'lr': 0.1 + 0.2,  # a float that short decimal text would not give back
    'none': None,
    'pair': (0.9, 0.999),
    'state': {0: {'exp_avg': torch.randn(3, 5), 'step': 7}, 1: {'exp_avg': torch.randn(2, dtype=torch.float64)}},
    'groups': [{'betas': (0.9, 0.95), 'params': [0, 1]}],
}


def write(work_dir: Path, step: int = 3, *, max_keep: int = 2) -> Path:
    def write_model(folder: Path) -> None:
        (folder / 'adapter_config.json').write_text('{}', encoding='utf-8')

    return write_checkpoint(work_dir, step, write_model=write_model, state=STATE, max_keep=max_keep)


def test_only_the_newest_are_kept_and_last_names_the_newest(tmp_path: Path) -> None:
    for step in (5, 100, 20, 1000):
        write(tmp_path, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ['checkpoint-00000100', 'checkpoint-00001000']
    assert (tmp_path / 'last').read_text(encoding='utf-8') == 'checkpoint-00001000\n'


def write_with_loss(
    work_dir: Path, step: int, loss: float | None, *, max_keep: int = 1, keep_best: bool = True
) -> None:
    write_checkpoint(work_dir, step, write_model=lambda _: None, state={'step': step, VALIDATION_LOSS: loss},
                     max_keep=1, keep_best=keep_best)  # fmt: skip


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.5), (3, None), (4, float('nan')), (5, 2.0), (6, 1.5)):
        write_with_loss(tmp_path, step, loss)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [6]  # of two equal ones the later
    write_with_loss(tmp_path, 7, 9.0)
    write_with_loss(tmp_path, 8, None)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [6, 8]
    assert (tmp_path / 'best').read_text(encoding='utf-8') == 'checkpoint-00000006\n'
    write_with_loss(tmp_path, 9, 9.0, keep_best=False)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [9]


def test_later_checkpoints_are_left_alone(tmp_path: Path) -> None:
    """As where a run was resumed from an earlier one: the one just written must not be the oldest of those to go."""
    for step in (2, 4, 6):
        write(tmp_path, step, max_keep=-1)
    write(tmp_path, 3, max_keep=1)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [3, 4, 6]
    assert (tmp_path / 'last').read_text(encoding='utf-8') == 'checkpoint-00000003\n'


def test_what_is_flushed_stands_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file, then its folder, then the rename, then the folder that holds the name."""
    order: list[str] = []
    flush, rename = file_utils.flush, Path.rename

    def noted_flush(path: Path) -> None:
        order.append(f'flush {path.name}')
        flush(path)

    def noted_rename(path: Path, target: Path) -> Path:
        order.append(f'rename {path.name}')
        return rename(path, target)

    monkeypatch.setattr(store, 'flush', noted_flush)
    monkeypatch.setattr(file_utils, 'flush', noted_flush)
    monkeypatch.setattr(Path, 'rename', noted_rename)
    folder = write(tmp_path)
    named = order.index(f'rename .saving-{folder.name}')
    files = {f'flush {p.name}' for p in folder.iterdir() if p.name != 'manifest.json'}
    assert files <= set(order[:named])
    assert order[named - 1] == f'flush .saving-{folder.name}'  # after the manifest took its name
    assert order[named + 1] == f'flush {tmp_path.name}'


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(store, '_write_manifest', full)
    with pytest.raises(CheckpointError, match=r'No space left.*earlier checkpoints are untouched'):
        write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []
    assert newest_checkpoint(tmp_path, warn=print).name == 'checkpoint-00000001'


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ('harm', 'message'), [(cut, 'were written'), (flip, 'has changed'), (Path.unlink, 'is missing')]
)
def test_harm_is_seen_and_the_checkpoint_before_it_is_taken(tmp_path: Path, harm: Any, message: str) -> None:
    write(tmp_path, 1)
    harm(write(tmp_path, 2) / 'trainer.safetensors')
    words: list[str] = []
    assert newest_checkpoint(tmp_path, warn=words.append).name == 'checkpoint-00000001'
    assert len(words) == 1
    assert message in words[0]


def test_no_manifest_means_not_whole(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / 'manifest.json').unlink()
    with pytest.raises(CheckpointError, match='not a complete checkpoint'):
        verify_checkpoint(folder)
    with pytest.raises(CheckpointError, match='no complete checkpoint to resume from'):
        newest_checkpoint(tmp_path, warn=lambda _: None)


def test_the_manifest_lists_every_file_but_itself(tmp_path: Path) -> None:
    folder = write(tmp_path)
    listed = set(json.loads((folder / 'manifest.json').read_text(encoding='utf-8')))
    assert listed == {p.name for p in folder.iterdir()} - {'manifest.json'}


@pytest.mark.parametrize('name', ['.partial-merged', '.saving-mine', '.partial-checkpoint-00000009', '.trash-2024'])
def test_unfinished_folders_of_others_stay(tmp_path: Path, name: str) -> None:
    """A converter may write into the work folder while the run goes on."""
    (tmp_path / name).mkdir()
    (tmp_path / name / 'model.safetensors.part').write_text('an hour of work', encoding='utf-8')
    recover(tmp_path)
    write(tmp_path, 1)
    clear_leftovers(tmp_path)
    assert (tmp_path / name / 'model.safetensors.part').read_text(encoding='utf-8') == 'an hour of work'


def test_a_merge_into_the_work_folder_outlives_a_save(tmp_path: Path) -> None:
    from xtuner.convert.output import atomic_folder

    with atomic_folder(tmp_path / 'merged', {'job': 1}) as folder:
        (folder / 'config.json').write_text('{}', encoding='utf-8')
        write(tmp_path, 1)
    assert (tmp_path / 'merged' / 'config.json').is_file()


def test_a_torn_save_and_a_begun_removal_of_ours_go(tmp_path: Path) -> None:
    for name in ('.saving-checkpoint-00000003', '.removing-checkpoint-00000001', '.trash-checkpoint-00000001'):
        (tmp_path / name).mkdir()
    recover(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_torn_save_of_an_earlier_version_goes(tmp_path: Path) -> None:
    """It had a prefix that converters have too, but none of them writes a trainer's state."""
    folder = write(tmp_path)
    (folder / 'trainer.safetensors').unlink()
    folder.rename(tmp_path / f'.partial-{folder.name}')
    recover(tmp_path)
    assert not list(tmp_path.glob('.partial-*'))


@pytest.mark.parametrize('prefix', ['.saving-', '.partial-'])
def test_a_whole_save_that_lacks_its_name_gets_it(tmp_path: Path, prefix: str) -> None:
    """Also one of an earlier version, which called them otherwise."""
    folder = write(tmp_path)
    folder.rename(tmp_path / f'{prefix}{folder.name}')
    recover(tmp_path)
    verify_checkpoint(folder)


@pytest.mark.parametrize('prefix', ['.saving-', '.removing-', '.partial-'])
@pytest.mark.parametrize('form', ['file', 'link'])
def test_files_and_links_under_such_names_stay(tmp_path: Path, prefix: str, form: str) -> None:
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    entry = tmp_path / f'{prefix}checkpoint-00000001'
    entry.write_text('', encoding='utf-8') if form == 'file' else entry.symlink_to(elsewhere)
    recover(tmp_path)
    write(tmp_path, 2)
    assert os.path.lexists(entry) and elsewhere.is_dir()


@pytest.mark.parametrize('name', ['checkpoint-00000099', 'checkpoint-' + '9' * 30, 'checkpoint-²', 'checkpoint-x'])
@pytest.mark.parametrize('form', ['folder', 'link', 'file'])
def test_foreign_checkpoints_are_neither_counted_nor_removed(tmp_path: Path, name: str, form: str) -> None:
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    (elsewhere / 'mine.txt').write_text('mine', encoding='utf-8')
    entry = tmp_path / 'run' / name
    entry.parent.mkdir()
    if form == 'folder':
        elsewhere.rename(entry)
    elif form == 'link':
        entry.symlink_to(elsewhere)
    else:
        entry.write_text('mine', encoding='utf-8')
    for step in (1, 2, 99, 100):
        write(tmp_path / 'run', step, max_keep=1)
    assert [step_of(p) for p in list_checkpoints(tmp_path / 'run')] == [100]
    kept = [p for p in (tmp_path / 'run').iterdir() if p.name.startswith(name)]
    assert len(kept) == 1
    assert (kept[0].read_text() if form == 'file' else (kept[0] / 'mine.txt').read_text()) == 'mine'


def test_a_checkpoint_of_ours_behind_a_link_is_resumed_and_not_pruned(tmp_path: Path) -> None:
    run, disk = tmp_path / 'run', tmp_path / 'larger_disk'
    moved = write(run, 1).rename(disk)
    link = run / 'checkpoint-00000001'
    link.symlink_to(moved)
    assert newest_checkpoint(run, warn=print) == link
    assert step_of(tmp_path / 'run' / 'checkpoint-00000001') == 1
    write(run, 2, max_keep=1)
    write(run, 3, max_keep=1)
    assert link.is_symlink() and [step_of(p) for p in list_checkpoints(run)] == [1, 3]
    verify_checkpoint(moved)
    write(run, 1, max_keep=-1)  # as a run does that was resumed from before
    assert not link.is_symlink() and (run / 'checkpoint-00000001.old-1').resolve() == moved


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = write(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o640}


def test_windows_flushes_files_that_it_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = os.open
    monkeypatch.setattr(file_utils, '_POSIX', False)
    monkeypatch.setattr(os, 'open', lambda path, flags, *more: opened.append(flags) or real(path, flags, *more))
    write(tmp_path)
    assert opened.count(os.O_RDWR) >= 4 and os.O_RDONLY not in opened


@pytest.mark.parametrize('content', ['[' * 100_000, '{"a": ' * 50_000, '[]', 'null', '{"a": 1}'])
def test_a_manifest_of_any_form_is_told_in_a_line(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path)
    (folder / 'manifest.json').write_text(content, encoding='utf-8')
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(folder)
    assert '\n' not in str(caught.value)
