"""Commands that begin with a slash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xtuner.chat.commands import COMMANDS, Exit, run_command
from xtuner.inference.generate import Sampling


def quiet(_: str) -> None:
    pass


def test_settings(scripted: Any) -> None:
    session = scripted.session(sampling=Sampling())
    for line, name, value in (('temperature 0.7', 'temperature', 0.7), ('top_p 1', 'top_p', 1.0),
                              ('max_new_tokens 5', 'max_new_tokens', 5), ('seed 3', 'seed', 3)):  # fmt: skip
        assert 'is now' in run_command(session, f'/set {line}').note
        assert getattr(session.sampling, name) == value
    run_command(session, '/set seed none')
    assert session.sampling == Sampling(5, 0.7, 1.0, None)
    assert run_command(session, '/set').note == 'max_new_tokens 5 · temperature 0.7 · top_p 1.0 · seed None'


@pytest.mark.parametrize(('line', 'message'), [
    ('temperature -1', 'temperature must be at least 0, got -1'), ('temperature nan', 'temperature'),
    ('top_p 0', 'top_p must be above 0'), ('top_p 1.5', 'at most 1'), ('top_p two', "must be a number, got 'two'"),
    ('max_new_tokens 0', 'integer of at least 1'), ('max_new_tokens 1.5', 'must be a number'),
    ('temprature 1', "did you mean 'temperature'"), ('seed x', 'seed must be a number'),
])  # fmt: skip
def test_a_wrong_setting_changes_nothing(scripted: Any, line: str, message: str) -> None:
    session = scripted.session()
    before = session.sampling
    assert message in run_command(session, f'/set {line}').note
    assert session.sampling == before


def test_system(scripted: Any) -> None:
    session = scripted.session()
    assert run_command(session, '/system').note == 'no system message is set'
    run_command(session, '/system Be brief.')
    assert session.system == 'Be brief.' and 'Be brief.' in run_command(session, '/system').note
    run_command(session, '/system -')
    assert session.system == ''


def test_retry_undo_clear(scripted: Any) -> None:
    session = scripted.session()
    assert run_command(session, '/retry').ask is None
    scripted.model.script = ['one<eoa>', 'two<eoa>']
    session.ask('first', quiet)
    reply = run_command(session, '/retry')
    assert reply.ask == 'first' and session.history == []
    session.ask('first', quiet)
    assert 'first' in run_command(session, '/undo').note and session.history == []
    assert 'no turn' in run_command(session, '/undo').note
    session.keep('a', 'b')
    run_command(session, '/clear')
    assert session.history == []


def test_save(scripted: Any, tmp_path: Path) -> None:
    session = scripted.session()
    assert 'needs a file' in run_command(session, '/save').note
    assert 'no conversation' in run_command(session, f'/save {tmp_path / "a.jsonl"}').note
    session.keep('a', 'b')
    run_command(session, f'/save {tmp_path / "with space.jsonl"}')
    assert (tmp_path / 'with space.jsonl').is_file()


def test_help_exit_and_what_is_unknown(scripted: Any) -> None:
    session = scripted.session()
    shown = run_command(session, '/help').note
    assert all(f'/{name}' in shown for name in COMMANDS)
    assert "did you mean 'clear'" in run_command(session, '/claer').note
    for name in ('exit', 'quit'):
        with pytest.raises(Exit):
            run_command(session, f'/{name}')
