"""What a run begins with, looked at before anything is prepared."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner.engine.start import Start, find_checkpoint
from xtuner.errors import CheckpointError


def test_weights_that_are_not_there_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'--start-from .*checkpoint-00000001: no such folder'):
        find_checkpoint(tmp_path / 'work', Start(weights=tmp_path / 'none' / 'checkpoint-00000001'), rank=0)
    assert find_checkpoint(tmp_path / 'work', Start(weights=tmp_path), rank=0) is None
