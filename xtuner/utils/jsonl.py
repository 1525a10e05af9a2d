"""JSON lines files with one record per step, which a run appends to and a resumed run continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtuner.errors import TrainingError
from xtuner.utils.files import write_atomically


def to_line(record: dict[str, Any]) -> str:
    """Formats a record as one line, with its line break; non-ASCII text is not escaped."""
    return json.dumps(record, ensure_ascii=False) + '\n'


def objects(raw: bytes) -> list[dict[str, Any]]:
    """Parses the JSON objects among the lines of `raw`; skips other lines, such as one cut off by a crash."""
    records = []
    for line in raw.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends a record, which contains the `step` it belongs to.

    Raises:
        TrainingError: The file cannot be written, for example on a full disk.
    """
    try:
        with path.open('a', encoding='utf-8') as file:
            file.write(to_line(record))
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
    try:
        write_atomically(path, b''.join(kept))
    except OSError as error:
        raise TrainingError(f'cannot write {path}: {error.strerror}') from error


def _step_of(line: bytes) -> float:
    """The step of a line; an incomplete line counts as after the last step."""
    try:
        return int(json.loads(line)['step']) if line.endswith(b'\n') else float('inf')
    except (ValueError, KeyError, TypeError):
        return float('inf')
