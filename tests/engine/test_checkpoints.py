"""Checkpoints: whole or not there, altered ones recognised, nothing in them executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xtuner.engine import checkpoints
from xtuner.engine.checkpoints import (
    VALIDATION_LOSS,
    list_checkpoints,
    newest_checkpoint,
    read_state,
    step_of,
    verify_checkpoint,
    write_checkpoint,
)
from xtuner.errors import CheckpointError

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


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = read_state(write(tmp_path))
    assert state['lr'] == STATE['lr']
    assert state['pair'] == (0.9, 0.999)
    assert state['groups'] == STATE['groups']
    assert list(state['state']) == [0, 1]
    for key in (0, 1):
        saved, loaded = STATE['state'][key]['exp_avg'], state['state'][key]['exp_avg']
        assert loaded.dtype == saved.dtype
        assert torch.equal(loaded, saved)


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
    flush, rename = checkpoints._flush, Path.rename

    def noted_flush(path: Path) -> None:
        order.append(f'flush {path.name}')
        flush(path)

    def noted_rename(path: Path, target: Path) -> Path:
        order.append(f'rename {path.name}')
        return rename(path, target)

    monkeypatch.setattr(checkpoints, '_flush', noted_flush)
    monkeypatch.setattr(Path, 'rename', noted_rename)
    folder = write(tmp_path)
    named = order.index(f'rename .partial-{folder.name}')
    files = {f'flush {p.name}' for p in folder.iterdir() if p.name != 'manifest.json'}
    assert files <= set(order[:named])
    assert order[named - 1] == f'flush .partial-{folder.name}'  # after the manifest took its name
    assert order[named + 1] == f'flush {tmp_path.name}'


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints, '_write_manifest', full)
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
    with pytest.raises(CheckpointError, match='not a whole checkpoint'):
        verify_checkpoint(folder)
    with pytest.raises(CheckpointError, match='no whole checkpoint to resume from'):
        newest_checkpoint(tmp_path, warn=lambda _: None)


def test_a_pickle_in_place_of_the_state_is_not_executed(tmp_path: Path) -> None:
    folder, marker = write(tmp_path), tmp_path / 'executed'

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    torch.save(Bomb(), folder / 'trainer.safetensors')
    with pytest.raises(CheckpointError, match='cannot be read'):
        read_state(folder)
    assert not marker.exists()


def test_the_manifest_lists_every_file_but_itself(tmp_path: Path) -> None:
    folder = write(tmp_path)
    listed = set(json.loads((folder / 'manifest.json').read_text(encoding='utf-8')))
    assert listed == {p.name for p in folder.iterdir()} - {'manifest.json'}
