"""The chat as people and scripts see it."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xtuner.chat import terminal
from xtuner.errors import DataError
from xtuner.inference.generate import Sampling


def talk(session: Any, monkeypatch: pytest.MonkeyPatch, *lines: Any) -> str:
    """What the user sees on standard output after typing lines; an exception is raised where a line is awaited."""
    waiting = list(lines)

    def read(prompt: str) -> str:
        line = waiting.pop(0) if waiting else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(terminal, 'read_message', read)
    out = io.StringIO()
    terminal.chat_interactive(session, out)
    assert not waiting
    return out.getvalue()


def test_a_conversation(scripted: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    session = scripted.session()
    scripted.model.script = ['I am well!<eoa>', '世界<eoa>', '/x<eoa>']
    shown = talk(session, monkeypatch, 'hi', '', KeyboardInterrupt(), '/retry', '//x', '/exit')
    assert shown.split('\n') == ['', 'I am well!', '', '', '', '世界', '', '/x', '', '']
    assert [m.content for m in session.history] == ['hi', '世界', '/x', '/x']
    noted = capsys.readouterr().err
    assert 'Ctrl-D exits' in noted and 'retrying: hi' in noted


def test_an_answer_does_not_command_the_terminal(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = scripted.session()
    scripted.model.script = ['a\x1b[2Jb<eoa>']
    assert 'a␛[2Jb' in talk(session, monkeypatch, 'hi')
    assert session.history[-1].content == 'a\x1b[2Jb'  # what is remembered and saved is what was said


def test_a_stopped_answer_is_kept_as_far_as_it_came(
    scripted: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    session = scripted.session()
    scripted.model.script = [['I am', KeyboardInterrupt()], [KeyboardInterrupt()], 'one<eoa>']
    talk(session, monkeypatch, 'first', 'second', 'third')
    assert [m.content for m in session.history] == ['first', 'I am', 'third', 'one']
    noted = capsys.readouterr().err
    assert 'the partial answer is kept' in noted and 'the message is discarded' in noted


def test_what_does_not_fit_is_said(
    scripted: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    session = scripted.session(max_length=60, sampling=Sampling(max_new_tokens=30))
    scripted.model.script = ['I am well!<eoa>', 'two<eoa>', 'three<eoa>']
    talk(session, monkeypatch, 'hi', 'how are you? ' * 4, 'how are you? ' * 9, 'how are you? ' * 50)
    noted = capsys.readouterr().err
    assert '(the oldest turn was dropped to fit the context length)' in noted
    assert re.search(r'\(the prompt is long: this answer was limited to \d+ tokens\)', noted)
    assert 'the context length is 60' in noted


def test_piped(scripted: Any, capsys: pytest.CaptureFixture) -> None:
    session = scripted.session()
    scripted.model.script = ['one\ntwo<eoa>', '世界<eoa>', 'three<eoa>']
    out = io.StringIO()
    terminal.chat_piped(session, ['hi\n', '\n', '/help\n'], out)
    assert out.getvalue() == 'one two\n世界\n'  # a script's lines are messages, whatever they begin with
    assert session.history[2].content == '/help'
    with pytest.raises(DataError, match='line 2: the prompt with this message'):
        terminal.chat_piped(session, ['\n', 'how are you? ' * 99], out)
    bytes_in = io.TextIOWrapper(io.BytesIO('世界\n'.encode() + b'\xff\n'), encoding='utf-8')
    with pytest.raises(DataError, match='line 2: not UTF-8: byte 0xff'):
        terminal.chat_piped(session, bytes_in, out)


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.leader, follower = os.openpty()
        self.process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(follower)
        self.seen = ''

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Waits for a pattern in what comes next; returns what came up to its end."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            ready, _, _ = select.select([self.leader], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise AssertionError(f'{pattern!r} did not come, but {self.seen[-2000:]!r}')
            try:
                self.seen += os.read(self.leader, 4096).decode('utf-8', 'replace')
            except OSError:
                raise AssertionError(f'the program ended after {self.seen[-2000:]!r}') from None
        came, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return came

    def interrupt(self, pattern: str) -> None:
        """Ctrl-C until a pattern comes: Python loses one that comes after readline's prompt and before it waits."""
        for _ in range(10):
            self.type('\x03')
            try:
                self.expect(pattern, seconds=3)
                return
            except AssertionError:
                continue
        raise AssertionError(f'{pattern!r} did not come after ten times Ctrl-C')

    def type(self, text: str) -> None:
        """Presses keys."""
        os.write(self.leader, text.encode())


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def chat(tiny_internlm: Path, tmp_path: Path) -> Iterator[Terminal]:
    """`xtuner chat` with a model whose answers are long."""
    environment = os.environ | {'XTUNER_CACHE': str(tmp_path), 'TERM': 'xterm', 'LANG': 'C.UTF-8', 'COLUMNS': '200'}
    command = [
        sys.executable,
        '-m',
        'xtuner.cli.main',
        'chat',
        str(tiny_internlm),
        '--prompt-template',
        'internlm_chat',
    ]
    opened = Terminal([*command, '--max-new-tokens', '1900', '--seed', '1'], environment)
    yield opened
    if opened.process.poll() is None:
        opened.process.send_signal(signal.SIGKILL)
    opened.process.wait()
    os.close(opened.leader)


def test_in_a_pseudo_terminal(chat: Terminal, tmp_path: Path) -> None:
    chat.expect('you > ')
    chat.type('/set max_new_tokens 5\r')
    chat.expect('max_new_tokens is now 5\r\n.*you > ')
    chat.type('first\\\r')
    chat.expect(r'\.\.\. > ')
    chat.type('second\r')
    chat.expect('you > ')
    chat.type('\x1b[A\x1b[A\x1b[A\r')  # arrow up, thrice: the command again
    chat.expect('max_new_tokens is now 5\r\n.*you > ')
    chat.type('/set max_new_tokens 1900\r')
    chat.expect('now 1900\r\n.*you > ')
    chat.type('long\r')
    chat.expect('long\r\n.{30}')
    chat.type('\x03')
    chat.expect('the partial answer is kept.*you > ')
    chat.type('/save ' + str(tmp_path / 'talk.jsonl') + '\r')
    chat.expect('conversation appended')
    chat.expect('you > ')
    chat.interrupt('Ctrl-D exits.*you > ')  # before that, the terminal itself would take the next key
    chat.type('\x04')
    assert chat.process.wait(30) == 0
    saved = (tmp_path / 'talk.jsonl').read_text(encoding='utf-8')
    assert '"first\\nsecond"' in saved and '"long"' in saved
    assert 'long' in (tmp_path / 'chat_history').read_text(encoding='utf-8')
