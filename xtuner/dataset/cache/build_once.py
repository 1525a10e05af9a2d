"""Build-once folders: one process builds, the others wait without a collective that could time out.

abc             the result; renamed to this name in one step once everything is written
abc.lock        locked (flock) by the process that builds; a leftover or empty file has no meaning
abc.part-...    unfinished output; each builder has its own
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
_ABANDONED_S = 86400.0  # unfinished output of another machine or boot is removed after this long without a write
_BOOT_ID = Path('/proc/sys/kernel/random/boot_id')


def cache_root(configured: str | None = None) -> Path:
    """Returns the cache folder: the configured path, else `$XTUNER_CACHE`, else `~/.cache/xtuner`."""
    return expanded(configured or os.environ.get('XTUNER_CACHE') or '~/.cache/xtuner')


def build_once(
    folder: Path,
    build: Callable[[Path], None],
    *,
    is_complete: Callable[[Path], bool],
    waiting: Callable[[str], None] = lambda holder: None,
) -> bool:
    """Makes sure that `folder` exists and is complete; returns whether this process built it.

    `build` writes into a temporary folder, which is renamed to `folder` once it is complete, so that an interruption
    leaves nothing that looks like a result. Other processes wait while the builder is alive; if it ends without a
    result, one of them builds.

    The lock only saves work; correctness does not depend on it. If two processes build at once, because the file
    system has no locks or lost one, each writes its own folder and the first to finish wins.

    Args:
        folder: The folder that must exist.
        build: Writes the content into the folder that it is given.
        is_complete: Whether a folder is a complete result.
        waiting: Called once with the builder's process and machine if this process has to wait.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f'{folder.name}.lock')
    waited = False
    while not is_complete(folder):
        with _locked(lock) as state:
            if state == 'no locks':
                logger.warning('%s: no file locks on this file system; each process prepares for itself', folder.parent)
            if state != 'taken':
                return not is_complete(folder) and _build(folder, build, is_complete, lock, state)
        if not waited:
            waiting(read_owner(lock) or 'another process')
            waited = True
        time.sleep(_POLL_S)
    return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[LockState]:
    """Tries to lock the file for the duration of the block.

    The file is never removed: that could remove the lock of another process that has just opened it.
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
    """Builds and publishes the folder; returns whether the result is this process's."""
    _clear_parts(folder, lock, locked=state == 'ours')
    part = folder.with_name(f'{folder.name}.part-{_kernel()}-{uuid.uuid4().hex[:12]}')
    try:
        build(part)
        if folder.exists() and not is_complete(folder):  # damaged by something other than a builder
            shutil.rmtree(folder)
        os.replace(part, folder)
    except OSError:
        if is_complete(folder):  # another builder without a lock was first
            return False
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def _clear_parts(folder: Path, lock: Path, *, locked: bool) -> None:
    """Removes the output of killed builders, but nothing that a live builder writes.

    While this process holds the lock, no other builder of this kernel is alive. A file system may keep locks within
    one machine only, or drop those of a suspended one, so output of other kernels is removed after a day without a
    write, measured by the file system's clock.
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
    """Identifies this machine's running kernel: shared by its containers, different after a reboot."""
    try:
        return _BOOT_ID.read_text(encoding='ascii').strip().replace('-', '')[:12]
    except OSError:  # not Linux
        return socket.gethostname().replace('-', '_')
