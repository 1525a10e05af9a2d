"""Exclusive locks on files, held by the kernel.

The kernel frees a lock when its process ends and not before: no time-out to misjudge after a suspend, no process id to
misread in another PID namespace, and NFS asks its server.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Literal

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LockState = Literal['ours', 'taken', 'no locks']


def try_lock(descriptor: int, *, per_process: bool = False) -> LockState:
    """Tries to lock an open file, without waiting.

    Args:
        descriptor: The file, opened for writing.
        per_process: Take a record lock (`lockf`): a fork does not hold it, and it ends with the first close of the file
            in this process. The default (`flock`) belongs to the open file: forks hold it too, until `unlock`.

    Returns:
        'ours', 'taken' by another process, or 'no locks' where the file system or the platform has none.
    """
    if fcntl is None:
        return 'no locks'
    take = fcntl.lockf if per_process else fcntl.flock
    try:
        take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return 'taken' if error.errno in (errno.EACCES, errno.EAGAIN) else 'no locks'
    return 'ours'


def is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file; its last holder may have removed it before this process locked it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def unlock(descriptor: int) -> None:
    """Releases a `flock`; closing alone would not while a fork of this process lives."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def write_owner(descriptor: int) -> None:
    """Writes this process and machine into the locked file, for the message that another process shows."""
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f'process {os.getpid()} on {socket.gethostname()}\n'.encode())


def read_owner(path: Path) -> str:
    """What `write_owner` wrote, such as 'process 7 on node3'; '' where nothing can be read."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding='utf-8', errors='replace').strip()
    return ''
