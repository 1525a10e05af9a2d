"""JSON lines files with one record per step, which a run appends to and a resumed run continues."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from xtuner.errors import TrainingError


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends a record, which contains the `step` it belongs to.

    Raises:
        TrainingError: The file cannot be written, for example on a full disk.
    """
    try:
        with path.open('a', encoding='utf-8') as file:
            file.write(json.dumps(record, ensure_ascii=False) + '\n')
    except OSError as error:
        raise TrainingError(
            f'cannot write {path}: {error.strerror}; the last checkpoint is kept, and --resume continues from it'
        ) from error


def truncate_after(path: Path, last_step: int) -> None:
    """Drops the lines of later steps, which a resumed run writes again, and an incomplete last line.

    Raises:
        TrainingError: The file cannot be written.
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
        os.replace(partial, path)  # atomic: a kill at this point loses nothing
    except OSError as error:
        raise TrainingError(f'cannot write {path}: {error.strerror}') from error


def _step_of(line: bytes) -> float:
    """The step of a line; an incomplete line counts as after the last step."""
    try:
        return int(json.loads(line)['step']) if line.endswith(b'\n') else float('inf')
    except (ValueError, KeyError, TypeError):
        return float('inf')
