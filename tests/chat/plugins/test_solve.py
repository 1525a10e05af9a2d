"""The equation solver: right solutions, nothing executed, ended in time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from xtuner.chat.plugins.base import PluginError
from xtuner.chat.plugins.solve import Solve

pytestmark = pytest.mark.unit


def test_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Solve(60).run('x^2 = 4') == 'x=-2; x=2'
    with pytest.raises(PluginError, match='no solution'):
        Solve(60).run('x = x + 1')
    monkeypatch.setenv('SERPER_API_KEY', 'secret')
    monkeypatch.setattr('xtuner.chat.plugins.solve.sys.executable', str(_program(tmp_path, 'echo "$SERPER_API_KEY|"')))
    assert Solve().run('x = 1') == '|'  # the key is not passed on


@pytest.mark.parametrize(('program', 'reason'), [
    ('sleep 30', 'within 0.5 s'), ('exit 1', 'ran out of'), ('kill -9 $$', 'ran out of'), ('true', 'ran out of'),
    ('printf "%02000d" 1', '2000 characters'),
])  # fmt: skip
def test_a_solver_that_hangs_or_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    monkeypatch.setattr('xtuner.chat.plugins.solve.sys.executable', str(_program(tmp_path, program)))
    started = time.perf_counter()
    with pytest.raises(PluginError, match=reason):
        Solve(0.5).run('x = 1')
    assert time.perf_counter() - started < 5


def _program(folder: Path, line: str) -> Path:
    path = folder / 'program'
    path.write_text(f'#!/bin/sh\n{line}\n')
    os.chmod(path, 0o700)
    return path
