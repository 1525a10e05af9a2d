"""Slash commands of the terminal chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from xtuner.chat.session import ChatSession
from xtuner.errors import UsageError, XTunerError, nearest
from xtuner.inference.generate import Sampling


class Exit(Exception):
    """Raised when the user ends the chat."""


@dataclass(frozen=True)
class Reply:
    """The output of a command, and a message to send to the model, if any."""

    note: str = ''
    ask: str | None = None


def _system(session: ChatSession, rest: str) -> Reply:
    if not rest:
        return Reply(f'system message: {session.system}' if session.system else 'no system message is set')
    session.system = '' if rest == '-' else rest
    return Reply('system message set for the following answers' if session.system else 'system message removed')


def _clear(session: ChatSession, rest: str) -> Reply:
    session.clear()
    return Reply('conversation cleared')


def _undo(session: ChatSession, rest: str) -> Reply:
    text = session.undo()
    return Reply('there is no turn to undo' if text is None else f'removed: {_short(text)}')


def _retry(session: ChatSession, rest: str) -> Reply:
    text = session.undo()
    if text is None:
        return Reply('there is no turn to retry')
    return Reply(f'retrying: {_short(text)}', text)


def _save(session: ChatSession, rest: str) -> Reply:
    if not rest:
        raise UsageError('/save needs a file: /save chat.jsonl')
    path = Path(rest).expanduser()
    session.save(path)
    return Reply(f'conversation appended to {path}')


def _set(session: ChatSession, rest: str) -> Reply:
    names = [field.name for field in fields(Sampling)]
    if not rest:
        return Reply(' · '.join(f'{name} {getattr(session.sampling, name)}' for name in names))
    name, _, value = rest.partition(' ')
    if name not in names:
        raise UsageError(f'unknown setting {name!r}{nearest(name, names)}; settings: {", ".join(names)}')
    change: dict[str, Any] = {name: _value(name, value.strip())}
    session.sampling = replace(session.sampling, **change)
    return Reply(f'{name} is now {getattr(session.sampling, name)}')


def _value(name: str, text: str) -> int | float | None:
    """Parses the value of a setting; the bounds are those of the command-line options."""
    try:
        if name == 'seed':
            return None if text in ('', 'none') else int(text)
        if name == 'max_new_tokens':
            value: int | float = int(text)
            allowed, text_of_bounds = value >= 1, 'an integer of at least 1'
        else:
            value = float(text)
            allowed = 0 <= value < float('inf') if name == 'temperature' else 0 < value <= 1
            text_of_bounds = 'at least 0' if name == 'temperature' else 'above 0 and at most 1'
    except ValueError:
        raise UsageError(f'{name} must be a number, got {text!r}') from None
    if not allowed:
        raise UsageError(f'{name} must be {text_of_bounds}, got {text}')
    return value


def _exit(session: ChatSession, rest: str) -> Reply:
    raise Exit


def _help(session: ChatSession, rest: str) -> Reply:
    lines = [f'{f"/{name} {argument}".strip():26}{help_}' for name, (_, argument, help_) in COMMANDS.items()]
    return Reply('\n'.join([*lines, *_KEYS]))


_KEYS = (
    f'{"a line that ends in a backslash":34}continues on the next line; """ starts and ends a multi-line message',
    f'{"Ctrl-C":34}stops an answer and keeps it as far as it was generated; Ctrl-D exits',
    f'{"//":34}a message that begins with a slash',
)

COMMANDS: dict[str, tuple[Callable[[ChatSession, str], Reply], str, str]] = {
    'help': (_help, '', 'shows this help'),
    'system': (_system, '[TEXT | -]', 'shows, sets or removes the system message'),
    'set': (_set, '[NAME VALUE]', 'shows or sets temperature, top_p, max_new_tokens, seed'),
    'retry': (_retry, '', 'generates the last answer again'),
    'undo': (_undo, '', 'removes the last turn'),
    'clear': (_clear, '', 'clears the conversation; the system message stays'),
    'save': (_save, 'FILE', 'appends the conversation to a file, as training data'),
    'exit': (_exit, '', 'exits, like Ctrl-D'),
}
_ALIASES = {'quit': 'exit', 'q': 'exit', '?': 'help', 'reset': 'clear', 'regenerate': 'retry'}


def run_command(session: ChatSession, line: str) -> Reply:
    """Runs a line that begins with one slash.

    Returns:
        The output; errors are returned as output too.

    Raises:
        Exit: the user ends the chat.
    """
    name, _, rest = line[1:].partition(' ')
    name = _ALIASES.get(name, name)
    if name not in COMMANDS:
        return Reply(f'unknown command /{name}{nearest(name, COMMANDS)}; /help lists the commands')
    try:
        return COMMANDS[name][0](session, rest.strip())
    except XTunerError as error:
        return Reply(str(error))


def _short(text: str, max_length: int = 60) -> str:
    line = ' '.join(text.split())
    return line if len(line) <= max_length else line[: max_length - 1] + '…'
