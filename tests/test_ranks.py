"""Which of several processes tells the user of an error."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from xtuner import ranks
from xtuner.engine.distributed import launch


def failed(exitcode: int, message: object = '') -> SimpleNamespace:
    return SimpleNamespace(exitcode=exitcode, message=message, signal_name=lambda: signal.Signals(-exitcode).name)


def test_the_error_of_a_run_is_the_one_that_began_it() -> None:
    told = failed(1, {'message': 'no such file'})
    assert str(launch._failure({0: failed(1), 3: told})) == 'no such file'
    assert launch._failure({0: failed(2, {'message': 'wrong call'})}).exit_status == 2
    # A rank that was killed comes before what the others say of it.
    assert 'rank 1 was killed by SIGKILL' in str(launch._failure({0: told, 1: failed(-9)}))
    assert 'rank 1 was killed by SIGSEGV' in str(launch._failure({1: failed(-11)}))
    assert (
        'no error message' in str(launch._failure({2: failed(7)})) and launch._failure({2: failed(7)}).exit_status == 7
    )


def test_only_the_first_of_a_node_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.delenv(ranks.CHILD, raising=False)
    told = []
    for rank in ('1', '0'):
        monkeypatch.setenv('RANK', rank)
        (tmp_path / rank).mkdir()
        monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / rank / 'error.json'))
        told.append(ranks.should_report('no such file'))
    assert told == [True, False]
    assert json.loads((tmp_path / '1' / 'error.json').read_text())['message']['message'] == 'no such file'
    assert not (tmp_path / '0' / 'error.json').exists()
    monkeypatch.setenv(ranks.CHILD, '1')
    assert not ranks.should_report('no such file')  # who started us prints it
