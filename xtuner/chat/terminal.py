"""Chat in a terminal, or one answer a line where input is piped."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from io import TextIOWrapper
from typing import TextIO

from xtuner.chat.commands import COMMANDS, Exit, run_command
from xtuner.chat.lines import line_editing, read_message
from xtuner.chat.moss import Call
from xtuner.chat.session import ChatSession
from xtuner.errors import DataError, XTunerError
from xtuner.utils.escape import printable

_PROMPT = 'you > '
_GREETING = '/help lists commands · Ctrl-C stops an answer · Ctrl-D ends'


def chat_piped(session: ChatSession, lines: Iterable[str], out: TextIO) -> None:
    """Answers each line of input on one line of output, nothing else there; a newline in an answer becomes a space.

    Raises:
        DataError: a line is too long for the model, or is no text; the message says which.
    """
    if isinstance(lines, TextIOWrapper):
        lines.reconfigure(errors='surrogateescape')  # what is no text is then told with its line
    for number, line in enumerate(lines, 1):
        if wrong := next((char for char in line if '\udc80' <= char <= '\udcff'), None):
            raise DataError(f'line {number}: not UTF-8: byte 0x{ord(wrong) & 0xFF:02x}')
        if text := line.strip():
            dropped = session.num_dropped_turns
            try:
                answer = session.ask(text, lambda _: None)
            except XTunerError as error:
                error.args = (f'line {number}: {error}',)
                raise
            line = ' '.join(answer.split())
            print(printable(line) if out.isatty() else line, file=out, flush=True)
            _say_what_was_left_out(session, dropped)


def chat_interactive(session: ChatSession, out: TextIO) -> None:
    """Reads, answers and streams until the user ends it."""
    _note(_GREETING)
    with line_editing(f'/{name}' for name in COMMANDS):
        while True:
            print(file=out)
            try:
                text = read_message(_PROMPT)
            except EOFError:
                print(file=out)
                return
            except KeyboardInterrupt:
                _note('\n(Ctrl-D ends)')
                continue
            try:
                _react(session, text, out)
            except Exit:
                return


def show_call(call: Call, result: str) -> None:
    """Says which tool was called, and what it gave."""
    _note(f'({call} => {result})')


def _react(session: ChatSession, text: str, out: TextIO) -> None:
    if text.startswith('/') and not text.startswith('//'):
        reply = run_command(session, text)
        _note(reply.note)
        if reply.ask is None:
            return
        text = reply.ask
    elif text.startswith('//'):
        text = text[1:]
    if text:
        _answer(session, text, out)


def _answer(session: ChatSession, text: str, out: TextIO) -> None:
    dropped = session.num_dropped_turns
    pieces: list[str] = []

    def show(piece: str) -> None:
        """Prints a piece of the answer as it comes, and keeps it in case the answer is stopped."""
        pieces.append(piece)
        print(printable(piece), end='', file=out, flush=True)

    try:
        session.ask(text, show)
    except KeyboardInterrupt:
        if pieces:
            session.keep(text, ''.join(pieces))
            _note('\n(stopped; the answer is kept as far as it came, /undo takes it back, /retry asks again)', end='')
        else:
            _note('\n(stopped before the answer began; nothing is kept)', end='')
    except XTunerError as error:
        _note(f'({error})', end='')
    print(file=out)
    _say_what_was_left_out(session, dropped)
    if pieces and session.room < session.sampling.max_new_tokens:
        _note(f'(the prompt is long: this answer had room for {session.room} tokens)')


def _say_what_was_left_out(session: ChatSession, dropped_before: int) -> None:
    turns = session.num_dropped_turns - dropped_before
    if turns:
        what = 'the oldest turn was' if turns == 1 else f'the {turns} oldest turns were'
        _note(f'({what} left out to make room)')


def _note(text: str, end: str = '\n') -> None:
    print(printable(text), end=end, file=sys.stderr, flush=True)
