"""Whether another process still runs, asked by files and ranks that name one.

A process number has a meaning only within one boot of one machine and one PID namespace: two containers may share a
host name and still see different processes under the same number.
"""

from __future__ import annotations

import os
import socket
import sys
from functools import cache
from pathlib import Path

_PROC = Path('/proc')


def this_process() -> str:
    """Names this process for `has_ended`: 'host boot-id pid-namespace pid start-time', '-' for what is unknown."""
    pid = os.getpid()
    return f'{_space()} {pid} {_start_time(pid) or "-"}'


def is_visible(process: str) -> bool:
    """Whether the process that `this_process` named runs, or ran, where this one can see it."""
    space, _, _ = _split(process)
    return os.name == 'posix' and space == _space() and not (sys.platform == 'linux' and '-' in space.split()[1:])


def has_ended(process: str) -> bool:
    """Whether the process that `this_process` named is known to be gone.

    False where it lives, and where that cannot be known: on another machine, in another PID namespace, on Windows
    (where asking would kill it), or for a text of another form.
    """
    _, pid, start = _split(process)
    if not pid.isdigit() or not is_visible(process):
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    now = _start_time(int(pid))
    return now is not None and start != '-' and now != start  # the number went to another process


def _split(process: str) -> tuple[str, str, str]:
    words = process.split()
    return (' '.join(words[:3]), words[3], words[4]) if len(words) == 5 else ('', '', '')


@cache
def _space() -> str:
    """Where process numbers have one meaning."""
    try:
        boot = (_PROC / 'sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()
        namespace = str((_PROC / 'self/ns/pid').stat().st_ino)
    except OSError:
        boot = namespace = '-'
    return f'{"".join(socket.gethostname().split()) or "-"} {boot} {namespace}'


def _start_time(pid: int) -> str | None:
    """Ticks from boot to a process's start, 'ended' for one that only waits for its parent; None: unknown."""
    try:
        line = (_PROC / str(pid) / 'stat').read_text(encoding='utf-8', errors='replace')
        fields = line[line.rindex(')') + 2 :].split()  # the name before may hold anything
        return 'ended' if fields[0] in ('Z', 'X') else fields[19]
    except (OSError, ValueError, IndexError):
        return None
