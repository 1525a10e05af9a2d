"""Chat in a terminal, or one answer a line where input is piped."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO

from xtuner.chat.session import ChatSession

_HELP = '/clear forgets the conversation · /exit, or Ctrl-D, ends · Ctrl-C stops an answer'


def chat_piped(session: ChatSession, lines: Iterable[str], out: TextIO) -> None:
    """Answers each line of input on one line of output, nothing else there; a newline in an answer becomes a space."""
    for line in lines:
        if text := line.strip():
            answer = session.ask(text, lambda _: None)
            print(' '.join(answer.split()), file=out, flush=True)


def chat_interactive(session: ChatSession, out: TextIO) -> None:
    """Reads, answers and streams until the user ends it."""
    print(_HELP, file=sys.stderr)
    while True:
        try:
            text = input('\nyou > ').strip()
        except EOFError:
            print(file=out)
            return
        except KeyboardInterrupt:
            print('\n(Ctrl-D ends)', file=sys.stderr)
            continue
        if text in ('/exit', '/quit'):
            return
        if text == '/clear':
            session.clear()
        elif text.startswith('/'):
            print(_HELP, file=sys.stderr)
        elif text:
            _answer(session, text, out)


def _answer(session: ChatSession, text: str, out: TextIO) -> None:
    dropped = session.num_dropped_turns
    try:
        session.ask(text, lambda piece: print(piece, end='', file=out, flush=True))
    except KeyboardInterrupt:
        print('\n(stopped; this answer is not kept)', end='', file=sys.stderr)
    print(file=out)
    if session.num_dropped_turns > dropped:
        print(f'({session.num_dropped_turns - dropped} oldest turns left out to make room)', file=sys.stderr)
