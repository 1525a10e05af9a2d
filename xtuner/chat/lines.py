"""Reads messages from a terminal: multi-line input, line editing, completion, persistent history.

Line editing uses the readline module of Python, which is GNU readline or libedit. Without it, lines are read plainly.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

_MAX_HISTORY_LINES = 1000
_FENCE = '"""'


def read_message(prompt: str, read: Callable[[str], str] = input) -> str:
    """Reads a message.

    A line that ends in a backslash continues on the next one. Lines are taken verbatim between two of \"\"\".

    Args:
        prompt: The prompt of the first line.
        read: Shows its argument as a prompt and reads a line.

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
    """Enables line editing, tab completion and a history file within the context.

    Args:
        words: Words that the tab key completes at the start of a line.
        history: The file; None means `chat_history` in `$XTUNER_CACHE` or `~/.cache/xtuner`. It contains the input
            and is readable only by its owner.
    """
    try:
        import readline
    except ImportError:  # on Windows
        yield
        return
    path = history or Path(os.environ.get('XTUNER_CACHE', '~/.cache/xtuner')).expanduser() / 'chat_history'
    _load(readline, path)
    sorted_words = sorted(words)

    def complete(text: str, state: int) -> str | None:
        """Returns completion number `state` of the text, None after the last (readline's protocol)."""
        matches = [word for word in sorted_words if word.startswith(text)] if text else []
        return matches[state] if state < len(matches) else None

    previous = readline.get_completer(), readline.get_completer_delims()
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
        readline.set_completer(previous[0])
        readline.set_completer_delims(previous[1])
        _store(readline, path)


def _is_libedit(readline: ModuleType) -> bool:
    """Whether readline is libedit, as on macOS, which has another syntax for key bindings."""
    return getattr(readline, 'backend', '') == 'editline' or 'libedit' in (readline.__doc__ or '')


def _load(readline: ModuleType, path: Path) -> None:
    readline.clear_history()
    with contextlib.suppress(OSError):  # missing or unreadable: start with an empty history
        readline.read_history_file(path)


def _store(readline: ModuleType, path: Path) -> None:
    readline.set_history_length(_MAX_HISTORY_LINES)
    with contextlib.suppress(OSError):  # an unwritable home folder has no history
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.write_history_file(path)
