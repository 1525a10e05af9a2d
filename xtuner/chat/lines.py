"""Messages from a terminal: several lines, arrow keys, a history that outlives the program.

GNU readline or libedit, whichever Python has, edits the line. Where it is missing, a line is what the terminal gives.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

_MOST_LINES = 1000  # of the history
_FENCE = '"""'


def read_message(prompt: str, read: Callable[[str], str] = input) -> str:
    """Reads a message.

    A line that ends in a backslash goes on in the next one. Lines between two of \"\"\" are taken as they are.

    Args:
        prompt: Shown before the first line.
        read: Reads a line after showing its argument.

    Raises:
        EOFError: the input has ended.
        KeyboardInterrupt: the user pressed Ctrl-C.
    """
    line = read(prompt)
    more = '.' * max(len(prompt.strip()) - 2, 2) + ' > '
    if line.strip().startswith(_FENCE):
        return _fenced(line.strip()[len(_FENCE) :], lambda: read(more))
    lines = [line]
    while lines[-1].endswith('\\'):
        lines[-1] = lines[-1][:-1]
        lines.append(read(more))
    return '\n'.join(lines).strip()


def _fenced(first: str, read: Callable[[], str]) -> str:
    lines = [first] if first else []
    while not (lines and lines[-1].rstrip().endswith(_FENCE)):
        lines.append(read())
    lines[-1] = lines[-1].rstrip()[: -len(_FENCE)]
    return '\n'.join(lines).strip('\n')


@contextlib.contextmanager
def line_editing(words: Iterable[str], history: Path | None = None) -> Iterator[None]:
    """Arrow keys, completion of words by the tab key, and a history in a file, while the context lasts.

    Args:
        words: What the tab key completes at the beginning of a line.
        history: The file; None takes `chat_history` in `$XTUNER_CACHE` or `~/.cache/xtuner`. It holds what was typed:
            only its owner may read it.
    """
    try:
        import readline
    except ImportError:  # not on Windows
        yield
        return
    path = history or Path(os.environ.get('XTUNER_CACHE', '~/.cache/xtuner')).expanduser() / 'chat_history'
    _load(readline, path)
    known = sorted(words)

    def complete(text: str, state: int) -> str | None:
        """The completion number `state` of what is typed; None after the last, as readline asks for them."""
        found = [word for word in known if word.startswith(text)] if text else []
        return found[state] if state < len(found) else None

    before = readline.get_completer(), readline.get_completer_delims()
    readline.set_completer(complete)
    readline.set_completer_delims('\n')
    if _is_libedit(readline):
        readline.parse_and_bind('bind ^I rl_complete')
    else:
        readline.parse_and_bind('tab: complete')
        readline.parse_and_bind('set enable-bracketed-paste on')
    try:
        yield
    finally:
        readline.set_completer(before[0])
        readline.set_completer_delims(before[1])
        _store(readline, path)


def _is_libedit(readline: ModuleType) -> bool:
    """Whether the module is libedit's, as on macOS, which reads key bindings in another form."""
    return getattr(readline, 'backend', '') == 'editline' or 'libedit' in (readline.__doc__ or '')


def _load(readline: ModuleType, path: Path) -> None:
    readline.clear_history()
    with contextlib.suppress(OSError):  # none yet, or one that cannot be read: there is nothing to go back to then
        readline.read_history_file(path)


def _store(readline: ModuleType, path: Path) -> None:
    readline.set_history_length(_MOST_LINES)
    with contextlib.suppress(OSError):  # a home that cannot be written to keeps no history
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.write_history_file(path)
