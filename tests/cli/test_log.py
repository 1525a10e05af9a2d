"""Log lines go to the stderr of the moment."""

from __future__ import annotations

import io
import logging

import pytest

from xtuner.cli.log import start_logging

pytestmark = pytest.mark.unit


def test_a_line_that_comes_after_stderr_was_replaced_is_written_and_not_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = logging.getLogger('xtuner')
    for name in ('handlers', 'propagate', 'level'):
        monkeypatch.setattr(project, name, getattr(project, name))
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr('sys.stderr', first)
    start_logging()
    project.warning('one')
    assert first.getvalue().endswith('one\n')
    first.close()  # as when a test's captured stderr goes, and the thread of a service it started is still there
    monkeypatch.setattr('sys.stderr', second)
    project.warning('two')
    assert second.getvalue().endswith('two\n') and 'Logging error' not in second.getvalue()
