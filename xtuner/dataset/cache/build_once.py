"""Prepared once: one process builds a folder, all others wait for it without any collective that could time out.

abc             the result; takes this name in one rename, when all is written
abc.lock        locked by the process that builds; an empty or stale file means nothing
abc.part-...    what a process is building: its own, whoever else builds
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from xtuner.utils.files import expanded
from xtuner.utils.locks import LockState, read_owner, try_lock, unlock, write_owner

logger = logging.getLogger('xtuner')

_POLL_S = 0.2
_ABANDONED_S = 86400.0  # after so long without a write, a part of another machine (or of before a reboot) is removed
_BOOT_ID = Path('/proc/sys/kernel/random/boot_id')


def cache_root(configured: str | None = None) -> Path:
    """Returns where prepared data is kept: as configured, else `$XTUNER_CACHE`, else `~/.cache/xtuner`."""
    return expanded(configured or os.environ.get('XTUNER_CACHE') or '~/.cache/xtuner')


def build_once(
    folder: Path,
    build: Callable[[Path], None],
    *,
    is_complete: Callable[[Path], bool],
    waiting: Callable[[str], None] = lambda holder: None,
) -> bool:
    """Makes sure that `folder` exists and is complete; returns whether this process built it.

    `build` writes into a folder of its own, which takes the name `folder` only when all is written: an interruption
    leaves nothing that looks like a result. Processes that come while another builds wait for as long as that process
    lives; when it ends without a result, one of them builds.

    The lock saves work; the result does not depend on it. Two that build at once, where a file system has no locks or
    lost one, write two folders, and the first to finish is kept.

    Args:
        folder: What is to exist.
        build: Writes the content into the folder it is given.
        is_complete: Whether a folder is a result.
        waiting: Called once when there is another to wait for, with its process and machine.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f'{folder.name}.lock')
    waited = False
    while not is_complete(folder):
        with _locked(lock) as state:
            if state == 'no locks':
                logger.warning('%s: this file system has no locks; each process prepares for itself', folder.parent)
            if state != 'taken':
                return not is_complete(folder) and _build(folder, build, is_complete, lock, state)
        if not waited:
            waiting(read_owner(lock) or 'another process')
            waited = True
        time.sleep(_POLL_S)
    return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[LockState]:
    """Tries to lock the file for the block.

    The file is never removed: removing it could take away the lock of another process that has just opened it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        state = try_lock(descriptor)
        if state != 'taken':
            write_owner(descriptor)
        yield state
    finally:
        unlock(descriptor)
        os.close(descriptor)


def _build(
    folder: Path, build: Callable[[Path], None], is_complete: Callable[[Path], bool], lock: Path, state: LockState
) -> bool:
    """Builds and publishes; returns whether the result is ours."""
    _clear_parts(folder, lock, locked=state == 'ours')
    part = folder.with_name(f'{folder.name}.part-{_kernel()}-{uuid.uuid4().hex[:12]}')
    try:
        build(part)
        if folder.exists() and not is_complete(folder):  # torn by something else than us
            shutil.rmtree(folder)
        os.replace(part, folder)
    except OSError:
        if is_complete(folder):  # another, that no lock kept out, was first
            return False
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def _clear_parts(folder: Path, lock: Path, *, locked: bool) -> None:
    """Removes what killed builders left, and never what a living one writes.

    Where we hold the lock, no builder of this kernel lives. A file system may keep locks within a machine only, or drop
    those of a suspended one: parts of others go after a day without a write, by the file system's own clock.
    """
    for part in folder.parent.glob(f'{folder.name}.part-*'):
        if locked and part.name.startswith(f'{folder.name}.part-{_kernel()}-'):
            shutil.rmtree(part, ignore_errors=True)
            continue
        with contextlib.suppress(OSError):  # its owner finishes or removes it at this moment
            os.utime(lock)
            written = max(path.stat().st_mtime for path in (part, *part.iterdir()))
            if lock.stat().st_mtime - written > _ABANDONED_S:
                shutil.rmtree(part, ignore_errors=True)


@functools.lru_cache(maxsize=1)
def _kernel() -> str:
    """Names this machine's running kernel: the same in its containers, another after a reboot."""
    try:
        return _BOOT_ID.read_text(encoding='ascii').strip().replace('-', '')[:12]
    except OSError:  # not Linux
        return socket.gethostname().replace('-', '_')
