"""Locks the work folder for one run at a time: two runs would prune each other's checkpoints."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from xtuner.errors import CheckpointError
from xtuner.utils.locks import is_at, read_owner, try_lock, write_owner

logger = logging.getLogger('xtuner')

LOCK_FILE = '.lock'
"""Contains the process and machine of the active run; only the lock on it counts, which ends with its process."""


@contextlib.contextmanager
def exclusive_run_dir(work_dir: Path) -> Iterator[None]:
    """Creates and locks the work folder for the block; afterwards removes folders that it created and that are empty.

    Raises:
        CheckpointError: The folder is not writable, or another run is active there.
    """
    try:
        created = [folder for folder in (work_dir, *work_dir.parents) if not folder.exists()]
        work_dir.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(work_dir / LOCK_FILE)
    except OSError as error:
        reason = 'it is a file' if os.path.isfile(work_dir) else error.strerror
        raise CheckpointError(f'cannot write to {work_dir}: {reason}; choose another --work-dir') from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (work_dir / LOCK_FILE).unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for folder in created:
                folder.rmdir()


def _locked(path: Path) -> int:
    """Opens and locks the file until the descriptor is closed; a forked child does not hold the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, path)
            if is_at(descriptor, path):  # otherwise the other run just ended and removed it
                write_owner(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    state = try_lock(descriptor, per_process=True)
    if state == 'no locks':
        logger.warning('%s: no file locks on this file system; a second run there would not be detected', path.parent)
    elif state == 'taken':
        raise CheckpointError(
            f'{path.parent}: another run is active there ({read_owner(path) or "unknown"}); '
            'wait for its end, or choose another --work-dir'
        )
