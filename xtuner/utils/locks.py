"""Exclusive locks on files, held by the kernel.

The kernel releases a lock exactly when its process ends: there is no time-out that a suspend could trip and no process
id that means something else in another PID namespace; on NFS the server holds the lock.
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
        'ours', 'taken' by another process, or 'no locks' if the file system or the platform does not support them.
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
    """Whether `path` still names the open file; its last owner may have removed it before this process locked it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def unlock(descriptor: int) -> None:
    """Releases a `flock`; closing alone would not release it while a fork of this process is alive."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def write_owner(descriptor: int) -> None:
    """Writes this process and machine into the locked file, for the error message of another process."""
    with contextlib.suppress(OSError):  # full disk: the lock holds without the owner's name
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f'process {os.getpid()} on {socket.gethostname()}\n'.encode())


def read_owner(path: Path) -> str:
    """Returns the text of `write_owner`, such as 'process 7 on node3'; '' if it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding='utf-8', errors='replace').strip()
    return ''
