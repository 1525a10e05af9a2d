"""Text of strangers in a terminal: errors, logs, tracebacks, samples, answers, notes."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hostile_text import COMMANDS, HOSTILE, obeyed
from xtuner.cli import main as cli
from xtuner.cli.log import start_logging
from xtuner.dataset.encode.conversation_encoder import Sample
from xtuner.dataset.show import show_sample
from xtuner.errors import DataError, UsageError
from xtuner.utils.escape import printable

pytestmark = pytest.mark.unit


def test_nothing_obeyed_is_left_and_the_rest_is_as_it_was() -> None:
    assert obeyed(HOSTILE) and not obeyed(printable(HOSTILE))
    assert printable('\x1b[31m\u202e\n\t') == '␛[31m\\u202e\n\t'
    for text in ('Grüße, 你好 🙂👩\u200d💻', 'مرحبا', 'a\n\tb'):
        assert printable(text) == text
    assert printable(printable(HOSTILE)) == printable(HOSTILE)


@pytest.mark.parametrize(
    'error', [DataError(HOSTILE), UsageError(HOSTILE), KeyError(HOSTILE), OSError(13, HOSTILE, HOSTILE)]
)
@pytest.mark.parametrize('debug', [False, True])
def test_an_error_of_a_command(
    error: Exception, debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, '_run', fail)
    assert cli.main(['serve', *['--debug'] * debug]) == (2 if isinstance(error, UsageError) else 1)
    said = capsys.readouterr().err
    assert 'clear' in said and not obeyed(said)
    assert len(said.splitlines()) == 1 or debug


@pytest.mark.torch
def test_a_chat_template_that_raises_escapes(
    tiny_internlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the tokenizer's file to the terminal."""
    import shutil

    folder = shutil.copytree(tiny_internlm, tmp_path / 'model')
    (folder / 'chat_template.jinja').write_text(
        "{%- if messages|length == 1 and messages[0].content == 'hi' -%}{{ raise_exception('\x1b[31mowned\u202e') }}"
        '{%- endif -%}{%- for m in messages -%}<s>{{ m.content }}</s>{%- endfor -%}', encoding='utf-8')  # fmt: skip
    monkeypatch.setattr(sys, 'stdin', io.StringIO('hi\n'))
    assert cli.main(['chat', str(folder)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert 'owned' in said and not obeyed(said)


def test_a_line_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger('xtuner')
    before = logger.handlers, logger.propagate
    try:
        start_logging()
        logger.info('model %r of %s', HOSTILE, HOSTILE)
        try:
            raise DataError(HOSTILE)
        except DataError:
            logger.exception('failed')
    finally:
        logger.handlers, logger.propagate = before
    said = capsys.readouterr().err
    assert said.count('clear') >= 3 and not obeyed(said)


def test_a_sample_of_the_data() -> None:
    class Tokenizer:
        def decode(self, ids: Any, **_: Any) -> str:
            return HOSTILE

    shown = show_sample(Sample(np.array([1, 2]), np.array([-100, 2])), Tokenizer(), color=False)
    assert shown.count('clear') == 2 and not obeyed(shown)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.torch
def test_answers_and_notes_of_a_chat(capsys: pytest.CaptureFixture[str]) -> None:
    from xtuner.chat import terminal
    from xtuner.chat.moss import Call

    class Session:
        num_dropped_turns = 0

        def ask(self, text: str, on_text: Any) -> str:
            if text == 'fail':
                raise DataError(HOSTILE)
            on_text(COMMANDS)
            return COMMANDS

    session: Any = Session()
    for out in (Terminal(), io.StringIO()):
        terminal.chat_piped(session, ['hi\n'], out)
        assert 'clear' in out.getvalue()
        assert bool(obeyed(out.getvalue())) != out.isatty(), 'a file gets what the model said'
    out = Terminal()
    session.sampling, session.answer_limit = type('S', (), {'max_new_tokens': 1}), 1
    terminal._answer(session, 'hi', out)
    terminal._answer(session, 'fail', out)
    terminal.show_call(Call('Search', HOSTILE), HOSTILE)
    assert 'clear' in out.getvalue() and not obeyed(out.getvalue())
    said = capsys.readouterr().err
    assert said.count('clear') >= 3 and not obeyed(said)
