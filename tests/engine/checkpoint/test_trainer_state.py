"""The trainer's state in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.checkpoint.test_store import STATE, write
from xtuner.engine.checkpoint.trainer_state import read_state
from xtuner.errors import CheckpointError


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


def test_a_pickle_in_place_of_the_state_is_not_executed(tmp_path: Path) -> None:
    folder, marker = write(tmp_path), tmp_path / 'executed'

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    torch.save(Bomb(), folder / 'trainer.safetensors')
    with pytest.raises(CheckpointError, match='cannot be read'):
        read_state(folder)
    assert not marker.exists()


def test_a_state_of_a_later_format_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path)
    path = folder / 'trainer.json'
    assert '"format"' in path.read_text(encoding='utf-8')
    content = json.loads(path.read_text(encoding='utf-8'))
    content['dict'] = [[key, 2 if key == 'format' else value] for key, value in content['dict']]
    path.write_text(json.dumps(content), encoding='utf-8')
    with pytest.raises(CheckpointError, match='format 2, but this version of xtuner reads format 1'):
        read_state(folder)
    content['dict'] = [pair for pair in content['dict'] if pair[0] != 'format']  # as before there was a number
    path.write_text(json.dumps(content), encoding='utf-8')
    assert read_state(folder)['lr'] == STATE['lr']


@pytest.mark.parametrize(
    'content', ['{"dict": 5}', '{"dict": [["a", {"tensor": "none"}]]}', '{"tensor": []}', '[]', '1']
)
def test_a_state_of_another_form_is_told(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path)
    (folder / 'trainer.json').write_text(content, encoding='utf-8')
    with pytest.raises(CheckpointError, match='the trainer state cannot be read'):
        read_state(folder)
