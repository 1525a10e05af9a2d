"""What a run begins with, looked at before anything is prepared."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner.engine.start import Start, check_start, find_checkpoint
from xtuner.errors import CheckpointError


def test_weights_that_are_not_there_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'--start-from .*checkpoint-00000001: no such folder'):
        find_checkpoint(tmp_path / 'work', Start(weights=tmp_path / 'none' / 'checkpoint-00000001'), rank=0)
    assert find_checkpoint(tmp_path / 'work', Start(weights=tmp_path), rank=0) is None


def test_a_classical_checkpoint_is_told_what_to_do_with_it(tmp_path: Path) -> None:
    (tmp_path / 'iter_600.pth').touch()
    with pytest.raises(CheckpointError, match=r'iter_600.pth: a checkpoint of classical xtuner .* pth_to_hf'):
        check_start(tmp_path / 'run', Start(resume=str(tmp_path / 'iter_600.pth')))
