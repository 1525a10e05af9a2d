"""`xtuner estimate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.engine.test_estimate import FLAGSHIP
from xtuner.cli.main import main


def test_command(tiny_internlm: Path, conversations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ['estimate', FLAGSHIP, '--model', str(tiny_internlm), '--data', str(conversations)]
    assert main([*words, '--gpu', 'h100', '--num-gpus', '2']) == 0
    out = capsys.readouterr().out
    assert 'counted by torch' in out
    assert 'Fits h100' in out
    assert re.search(r'internlm\d*: [\d.]+ [kM] parameters', out)  # not '0.00 B'
    assert 'on 2 x h100' in out
    assert main([*words, '--step-seconds', '1800', '--max-steps', '3']) == 2
    assert main([*words, '--step-seconds', '1800', '--cfg-options', 'schedule.max_steps=3']) == 0
    assert 'time: 1 h 30 min at 1800 s per step' in capsys.readouterr().out
    assert main([*words, '--json', '--no-data']) == 0
    assert json.loads(capsys.readouterr().out)['memory']['allocated'] > 0


def test_command_without_the_data_still_tells_the_memory(
    folder_7b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['estimate', FLAGSHIP, '--model', str(folder_7b), '--data', str(tmp_path / 'none.jsonl')]) == 0
    found = capsys.readouterr()
    assert 'the size of the data is unknown' in found.err
    assert 'the number of steps is unknown' in found.out
    assert '  base               3.90   frozen weights' in found.out
