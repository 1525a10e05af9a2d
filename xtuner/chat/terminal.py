"""Chat in a terminal, or line by line with piped input."""

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
_GREETING = '/help lists commands · Ctrl-C stops an answer · Ctrl-D exits'


def chat_piped(session: ChatSession, lines: Iterable[str], out: TextIO) -> None:
    """Answers each line of input with exactly one line of output; newlines in answers become spaces.

    Raises:
        DataError: a line exceeds the context length or is not UTF-8; the message has its number.
    """
    if isinstance(lines, TextIOWrapper):
        lines.reconfigure(errors='surrogateescape')  # invalid bytes are then reported with their line
    for number, line in enumerate(lines, 1):
        if invalid := next((char for char in line if '\udc80' <= char <= '\udcff'), None):
            raise DataError(f'line {number}: not UTF-8: byte 0x{ord(invalid) & 0xFF:02x}')
        if text := line.strip():
            dropped = session.num_dropped_turns
            try:
                answer = session.ask(text, lambda _: None)
            except XTunerError as error:
                error.args = (f'line {number}: {error}',)
                raise
            line = ' '.join(answer.split())
            print(printable(line) if out.isatty() else line, file=out, flush=True)
            _report_dropped_turns(session, dropped)


def chat_interactive(session: ChatSession, out: TextIO) -> None:
    """Reads messages and streams answers until the user exits."""
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
                _note('\n(Ctrl-D exits)')
                continue
            try:
                _handle(session, text, out)
            except Exit:
                return


def show_call(call: Call, result: str) -> None:
    """Displays a tool call and its result."""
    _note(f'({call} => {result})')


def _handle(session: ChatSession, text: str, out: TextIO) -> None:
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
        """Prints a piece of the answer and stores it in case the answer is stopped."""
        pieces.append(piece)
        print(printable(piece), end='', file=out, flush=True)

    try:
        session.ask(text, show)
    except KeyboardInterrupt:
        if pieces:
            session.keep(text, ''.join(pieces))
            _note('\n(stopped; the partial answer is kept: /undo removes it, /retry generates it again)', end='')
        else:
            _note('\n(stopped before the answer started; the message is discarded)', end='')
    except XTunerError as error:
        _note(f'({error})', end='')
    print(file=out)
    _report_dropped_turns(session, dropped)
    if pieces and session.answer_limit < session.sampling.max_new_tokens:
        _note(f'(the prompt is long: this answer was limited to {session.answer_limit} tokens)')


def _report_dropped_turns(session: ChatSession, dropped_before: int) -> None:
    turns = session.num_dropped_turns - dropped_before
    if turns:
        dropped = 'the oldest turn was' if turns == 1 else f'the {turns} oldest turns were'
        _note(f'({dropped} dropped to fit the context length)')


def _note(text: str, end: str = '\n') -> None:
    print(printable(text), end=end, file=sys.stderr, flush=True)
