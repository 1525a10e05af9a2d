"""Room on the disk: the prediction is an upper bound, and InternLM's own tokenizer leaves it one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.faults.lives import newest, words_for
from xtuner.cli.main import main
from xtuner.engine.checkpoint import disk_space
from xtuner.engine.checkpoint.disk_space import check_space, checkpoint_bytes
from xtuner.errors import CheckpointError


def test_moments_are_counted_as_they_are_once_they_are_there() -> None:
    weight = torch.nn.Parameter(torch.zeros(1000, 1000))
    assert checkpoint_bytes([weight]) == 3 * 4_000_000 + 5 * 2**20
    small = {weight: {'exp_avg': torch.zeros(1000, 1000, dtype=torch.uint8), 'step': 3}}
    assert checkpoint_bytes([weight], small) == 4_000_000 + 1_000_000 + 5 * 2**20


def test_a_folder_that_is_not_there_yet_is_asked_of_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=2**30)

    monkeypatch.setattr(disk_space.shutil, 'disk_usage', usage)
    check_space(tmp_path / 'a' / 'b', 2**30, 'checkpoints')
    assert asked == [tmp_path]
    with pytest.raises(CheckpointError, match=r'has 1.00 GiB free, but 3 checkpoints need up to 1.50 GiB; free some'):
        check_space(tmp_path / 'a' / 'b', 3 * 2**29, '3 checkpoints')


@pytest.mark.parametrize('model', ['tiny_internlm', pytest.param('real_vocabulary_internlm', marks=pytest.mark.real)])
def test_a_checkpoint_is_adapter_and_moments_and_5_mb(
    model: str, request: pytest.FixtureRequest, conversations: Path, tmp_path: Path
) -> None:
    """Also with InternLM's 103,168 pieces."""
    words = words_for(request.getfixturevalue(model), conversations, tmp_path / 'run', 'adapter.r=16', steps=1)
    assert main(words) == 0
    folder = newest(tmp_path / 'run')
    adapter = (folder / 'adapter_model.safetensors').stat().st_size
    whole = sum(file.stat().st_size for file in folder.iterdir())
    assert whole <= 3 * adapter + 5_000_000
    assert not (folder / 'tokenizer.model').exists()
