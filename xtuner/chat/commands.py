"""What begins with a slash: commands to the chat itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from xtuner.chat.session import ChatSession
from xtuner.errors import UsageError, XTunerError, nearest
from xtuner.inference.generate import Sampling


class Exit(Exception):
    """The user ends the chat."""


@dataclass(frozen=True)
class Reply:
    """What a command says, and a message to ask in its wake."""

    note: str = ''
    ask: str | None = None


def _system(session: ChatSession, rest: str) -> Reply:
    if not rest:
        return Reply(f'system message: {session.system}' if session.system else 'there is no system message')
    session.system = '' if rest == '-' else rest
    return Reply('system message set, from the next answer on' if session.system else 'system message removed')


def _clear(session: ChatSession, rest: str) -> Reply:
    session.clear()
    return Reply('conversation forgotten')


def _undo(session: ChatSession, rest: str) -> Reply:
    text = session.undo()
    return Reply('there is no turn to take back' if text is None else f'taken back: {_short(text)}')


def _retry(session: ChatSession, rest: str) -> Reply:
    text = session.undo()
    if text is None:
        return Reply('there is no turn to answer again')
    return Reply(f'again: {_short(text)}', text)


def _save(session: ChatSession, rest: str) -> Reply:
    if not rest:
        raise UsageError('/save needs a file: /save chat.jsonl')
    path = Path(rest).expanduser()
    session.save(path)
    return Reply(f'conversation added to {path}')


def _set(session: ChatSession, rest: str) -> Reply:
    known = [field.name for field in fields(Sampling)]
    if not rest:
        return Reply(' · '.join(f'{name} {getattr(session.sampling, name)}' for name in known))
    name, _, value = rest.partition(' ')
    if name not in known:
        raise UsageError(f'/set knows no {name!r}{nearest(name, known)}; it knows {", ".join(known)}')
    change: dict[str, Any] = {name: _value(name, value.strip())}
    session.sampling = replace(session.sampling, **change)
    return Reply(f'{name} is now {getattr(session.sampling, name)}')


def _value(name: str, text: str) -> int | float | None:
    """A setting's value from text; the bounds are those of the command line's flags."""
    try:
        if name == 'seed':
            return None if text in ('', 'none') else int(text)
        if name == 'max_new_tokens':
            value: int | float = int(text)
            allowed, what = value >= 1, 'a whole number from 1'
        else:
            value = float(text)
            allowed = 0 <= value < float('inf') if name == 'temperature' else 0 < value <= 1
            what = 'a number from 0' if name == 'temperature' else 'above 0 and at most 1'
    except ValueError:
        raise UsageError(f'{name} must be a number, got {text!r}') from None
    if not allowed:
        raise UsageError(f'{name} must be {what}, got {text}')
    return value


def _exit(session: ChatSession, rest: str) -> Reply:
    raise Exit


def _help(session: ChatSession, rest: str) -> Reply:
    lines = [f'{f"/{name} {argument}".strip():26}{what}' for name, (_, argument, what) in COMMANDS.items()]
    return Reply('\n'.join([*lines, *_KEYS]))


_KEYS = (
    f'{"a line that ends in a backslash":34}goes on in the next; """ before and after takes lines as they are',
    f'{"Ctrl-C":34}stops an answer, which is kept as far as it came; Ctrl-D ends',
    f'{"//":34}a message that begins with a slash',
)

COMMANDS: dict[str, tuple[Callable[[ChatSession, str], Reply], str, str]] = {
    'help': (_help, '', 'shows this'),
    'system': (_system, '[TEXT | -]', 'shows, sets or removes the system message'),
    'set': (_set, '[NAME VALUE]', 'shows or sets temperature, top_p, max_new_tokens, seed'),
    'retry': (_retry, '', 'answers the last message again'),
    'undo': (_undo, '', 'takes the last turn back'),
    'clear': (_clear, '', 'forgets the conversation; the system message stays'),
    'save': (_save, 'FILE', 'adds the conversation to a file, as training data'),
    'exit': (_exit, '', 'ends, as Ctrl-D does'),
}
_OTHER_NAMES = {'quit': 'exit', 'q': 'exit', '?': 'help', 'reset': 'clear', 'regenerate': 'retry'}


def run_command(session: ChatSession, line: str) -> Reply:
    """Runs a line that begins with one slash.

    Returns:
        What to say; an error is said too, it ends nothing.

    Raises:
        Exit: the user is done.
    """
    name, _, rest = line[1:].partition(' ')
    name = _OTHER_NAMES.get(name, name)
    if name not in COMMANDS:
        return Reply(f'there is no /{name}{nearest(name, COMMANDS)}; /help lists the commands')
    try:
        return COMMANDS[name][0](session, rest.strip())
    except XTunerError as error:
        return Reply(str(error))


def _short(text: str, most: int = 60) -> str:
    line = ' '.join(text.split())
    return line if len(line) <= most else line[: most - 1] + '…'
