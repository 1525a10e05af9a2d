"""`about.json` in a work folder: run metadata, and every session (start) of the run with its end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from xtuner.errors import CheckpointError, Interrupted
from xtuner.tracking.environment import devices, git_state, versions
from xtuner.utils.files import read_object, write_atomically

logger = logging.getLogger('xtuner')

ABOUT_FILE = 'about.json'


@contextmanager
def record_session(
    work_dir: Path, facts: dict[str, Any] | None, *, from_step: int, at_end: Callable[[Path], None]
) -> Iterator[None]:
    """Records the start and the end of a session around the block, then calls `at_end`. Its errors never end a run.

    Args:
        work_dir: The run's folder.
        facts: Run metadata as JSON values, such as its schedule and data summary. None: another process records it.
        from_step: Optimizer steps completed before this session.
        at_end: Called with the folder after the end is recorded, such as `try_to_report`.
    """
    if facts is None:
        yield
        return
    session = {
        'started': _now(),
        'from_step': from_step,
        'end': 'not recorded: the process was killed, or is still running',
        'versions': versions(),
        'devices': devices(),
        'git': git_state(),
    }
    before = read_about(work_dir).get('sessions')
    sessions = [*(before if isinstance(before, list) else []), session]
    about = {**facts, 'sessions': sessions}
    _write(work_dir, about)
    try:
        yield
        session['end'] = 'finished'
    except BaseException as error:
        session['end'] = _ending(error)
        raise
    finally:
        session['ended'] = _now()
        _write(work_dir, about)
        at_end(work_dir)


def read_about(work_dir: Path) -> dict[str, Any]:
    """Reads `about.json`; empty if it is missing or cannot be read."""
    try:
        return read_object(work_dir / ABOUT_FILE, CheckpointError)
    except CheckpointError:
        return {}


def _write(work_dir: Path, about: dict[str, Any]) -> None:
    path = work_dir / ABOUT_FILE
    try:
        write_atomically(path, json.dumps(about, indent=1, ensure_ascii=False, default=str) + '\n')
    except OSError as error:
        logger.warning('cannot write %s: %s', path, error.strerror)


def _ending(error: BaseException) -> str:
    text = ' '.join(str(error).split())
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return f'interrupted: {text}' if text else 'interrupted'
    return f'failed: {text or type(error).__name__}'


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec='seconds')
