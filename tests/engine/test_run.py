"""What a run makes of errors that no step has caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner.config.load import load_config
from xtuner.engine import run
from xtuner.errors import TrainingError


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the training of a prepared run raise."""

    def raises(*args: object) -> None:
        raise error

    monkeypatch.setattr(run, '_prepare', lambda *args: None)
    monkeypatch.setattr(run, '_run', raises)


def test_a_data_worker_that_dies_between_steps_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'), monkeypatch)
    with pytest.raises(TrainingError, match=r'a DataLoader worker died \(DataLoader worker \(pid 7\)'):
        run.train(load_config('internlm_7b_qlora_oasst1'), work_dir=tmp_path / 'run')


@pytest.mark.parametrize('error', [RuntimeError('something else'), TrainingError('no gradient')])
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(error, monkeypatch)
    with pytest.raises(type(error)) as raised:
        run.train(load_config('internlm_7b_qlora_oasst1'), work_dir=tmp_path / 'run')
    assert raised.value is error
