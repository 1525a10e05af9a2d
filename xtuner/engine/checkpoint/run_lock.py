"""The work folder belongs to one run at a time: two that save there would prune each other's checkpoints."""

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
"""Holds the process and machine of the run under way; what counts is the lock on it, which ends with its process."""


@contextlib.contextmanager
def exclusive_run_dir(work_dir: Path) -> Iterator[None]:
    """Makes the work folder and holds it for the time of a `with` block; what was made and stayed empty goes again.

    Raises:
        CheckpointError: nothing can be written there, or another run is under way there.
    """
    try:
        made = [folder for folder in (work_dir, *work_dir.parents) if not folder.exists()]
        work_dir.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(work_dir / LOCK_FILE)
    except OSError as error:
        reason = 'it is a file' if os.path.isfile(work_dir) else error.strerror
        raise CheckpointError(f'cannot write to {work_dir}: {reason}; give another --work-dir') from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (work_dir / LOCK_FILE).unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def _locked(path: Path) -> int:
    """Opens and locks the file, which is this run's until the descriptor is closed; a fork of us does not hold it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, path)
            if is_at(descriptor, path):
                write_owner(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    state = try_lock(descriptor, per_process=True)
    if state == 'no locks':
        logger.warning('%s: this file system has no locks; a second run there would not be noticed', path.parent)
    elif state == 'taken':
        raise CheckpointError(
            f'{path.parent}: another run is under way there ({read_owner(path) or "unknown"}); '
            'wait for its end, or give another --work-dir'
        )
