"""`about.json`: each start of a run, and how it ended, however it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner.errors import Interrupted, TrainingError
from xtuner.tracking.report.page import try_to_report
from xtuner.tracking.sessions import read_about, record_session


def sessions(folder: Path) -> list[dict[str, str]]:
    return read_about(folder)['sessions']


def test_each_start_is_told_with_its_end(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), record_session(tmp_path, {'base': 'b'}, from_step=0, at_end=try_to_report):
        assert 'killed' in sessions(tmp_path)[0]['end']  # as it stands if nothing more is written
        raise Interrupted(15, 'stopped at step 3')
    with pytest.raises(TrainingError), record_session(tmp_path, {'base': 'b'}, from_step=3, at_end=try_to_report):
        raise TrainingError('no\nluck')
    with record_session(tmp_path, {'base': 'b'}, from_step=3, at_end=try_to_report):
        pass
    assert [s['end'] for s in sessions(tmp_path)] == ['interrupted: stopped at step 3', 'failed: no luck', 'finished']
    assert [s['from_step'] for s in sessions(tmp_path)] == [0, 3, 3]
    assert read_about(tmp_path)['base'] == 'b'
    assert (tmp_path / 'report.html').is_file()


def test_another_process_tells_nothing(tmp_path: Path) -> None:
    with record_session(tmp_path, None, from_step=0, at_end=try_to_report):
        pass
    assert not list(tmp_path.iterdir())


def test_nothing_about_the_story_ends_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with record_session(tmp_path / 'missing', {}, from_step=0, at_end=try_to_report):
        pass
    assert 'cannot write' in caplog.text
    assert 'no report' in caplog.text
