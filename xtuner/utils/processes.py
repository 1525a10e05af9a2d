"""Identifies processes across files and ranks, and checks whether they are still running.

A process id is only unique within one boot of one machine and one PID namespace: two containers may share a host name
and still have different processes with the same id.
"""

from __future__ import annotations

import os
import socket
import sys
from functools import cache
from pathlib import Path

_PROC = Path('/proc')


def this_process() -> str:
    """Identifies this process for `has_ended`: 'host boot-id pid-namespace pid start-time', '-' if unknown."""
    pid = os.getpid()
    return f'{_pid_scope()} {pid} {_start_time(pid) or "-"}'


def is_visible(process: str) -> bool:
    """Whether a process identified by `this_process` is, or was, in the same PID namespace as this one."""
    scope, _, _ = _split(process)
    return os.name == 'posix' and scope == _pid_scope() and not (sys.platform == 'linux' and '-' in scope.split()[1:])


def has_ended(process: str) -> bool:
    """Whether a process identified by `this_process` is known to have ended.

    False if it is alive or its state cannot be determined: on another machine, in another PID namespace, on Windows
    (where os.kill would kill it), or for a malformed identifier.
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
    return now is not None and start != '-' and now != start  # the id was reused by another process


def _split(process: str) -> tuple[str, str, str]:
    words = process.split()
    return (' '.join(words[:3]), words[3], words[4]) if len(words) == 5 else ('', '', '')


@cache
def _pid_scope() -> str:
    """The scope within which process ids are unique."""
    try:
        boot = (_PROC / 'sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()
        namespace = str((_PROC / 'self/ns/pid').stat().st_ino)
    except OSError:
        boot = namespace = '-'
    return f'{"".join(socket.gethostname().split()) or "-"} {boot} {namespace}'


def _start_time(pid: int) -> str | None:
    """Ticks from boot to a process's start; 'ended' for a zombie; None: unknown."""
    try:
        line = (_PROC / str(pid) / 'stat').read_text(encoding='utf-8', errors='replace')
        fields = line[line.rindex(')') + 2 :].split()  # the name before may contain anything
        return 'ended' if fields[0] in ('Z', 'X') else fields[19]
    except (OSError, ValueError, IndexError):
        return None
