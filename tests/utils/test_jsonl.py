"""JSON lines: appended, cut after a step, read past torn ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner.errors import TrainingError
from xtuner.utils.jsonl import append_line, objects, to_line, truncate_after

pytestmark = pytest.mark.unit


def test_lines_are_appended_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / 'metrics.jsonl'
    for step in (1, 2):
        append_line(path, {'step': step, 'text': '你好'})
    assert path.read_text(encoding='utf-8') == '{"step": 1, "text": "你好"}\n{"step": 2, "text": "你好"}\n'
    assert objects(path.read_bytes()) == [{'step': 1, 'text': '你好'}, {'step': 2, 'text': '你好'}]
    assert to_line({}) == '{}\n'


def test_lines_that_hold_no_object_are_left_out() -> None:
    assert objects(b'3\n[1]\nnull\n{"step": 1}\n' + b'[' * 100_000 + b'\n\xff\n{"step": 2') == [{'step': 1}]


def test_later_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"step": 1}\n{"step": 3}\n{"step": 2}\n{"loss": 1}\n{"step": 1')
    truncate_after(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']
    truncate_after(tmp_path / 'missing', 2)


def test_a_line_that_cannot_be_written_ends_the_run_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r'cannot write .*: Is a directory; the last checkpoint is kept'):
        append_line(tmp_path, {'step': 1})
