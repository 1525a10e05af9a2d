"""What a model card and a report take from the work folder."""

from __future__ import annotations

from pathlib import Path

from xtuner.tracking.files import METRICS_FILE
from xtuner.tracking.metadata import latest_losses


def test_the_last_losses_are_read_past_lines_that_hold_none(tmp_path: Path) -> None:
    assert latest_losses(tmp_path) == {}
    lines = [
        '{"step": 1, "loss": 3.0}',
        '{"step": 1, "val_loss": 2.5}',
        '{"step": 2, "loss": 2.0}',
        '7',
        'null',
        '{"st',
    ]
    (tmp_path / METRICS_FILE).write_text('\n'.join(lines))
    assert latest_losses(tmp_path) == {'step': 2, 'loss': 2.0, 'val_loss': 2.5}


def test_of_a_long_file_only_the_end_is_read(tmp_path: Path) -> None:
    line = '{"step": 1, "val_loss": 9.0}\n'
    (tmp_path / METRICS_FILE).write_text(line + '{"step": 2, "loss": 1.0}\n' * 100_000)
    assert latest_losses(tmp_path) == {'step': 2, 'loss': 1.0}
