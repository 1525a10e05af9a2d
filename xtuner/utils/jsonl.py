"""Files of JSON lines, one a step, to which a run appends and which a resumed run takes up again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from xtuner.errors import TrainingError


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds one line; `record` holds the `step` it belongs to.

    Raises:
        TrainingError: the file cannot be written, as on a full disk.
    """
    try:
        with path.open('a', encoding='utf-8') as file:
            file.write(json.dumps(record, ensure_ascii=False) + '\n')
    except OSError as error:
        raise TrainingError(
            f'cannot write {path}: {error.strerror}; the last checkpoint is kept, and --resume goes on from it'
        ) from error


def truncate_after(path: Path, last_step: int) -> None:
    """Drops the lines of later steps, which a resumed run will write again, and one that a crash tore.

    Raises:
        TrainingError: the file cannot be written.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= last_step]
    if len(kept) == len(lines):
        return
    partial = path.with_name(f'{path.name}.partial')
    try:
        partial.write_bytes(b''.join(kept))
        os.replace(partial, path)  # at once: whoever is killed here has lost nothing
    except OSError as error:
        raise TrainingError(f'cannot write {path}: {error.strerror}') from error


def _step_of(line: bytes) -> float:
    """The step of a line; a torn one counts as beyond the end."""
    try:
        return int(json.loads(line)['step']) if line.endswith(b'\n') else float('inf')
    except (ValueError, KeyError, TypeError):
        return float('inf')
