"""A folder that appears as a whole, or not at all; interrupted work is kept beside it and gone on with."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xtuner.errors import ModelError, XTunerError

logger = logging.getLogger('xtuner')

_JOB_FILE = 'unfinished'  # holds a hash of the job


def check_output(out: Path) -> None:
    """Raises ModelError where `out` is a file or holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f'{out} is not empty; nothing was written: name another folder or remove it')


@contextmanager
def whole_folder(out: Path, job: Any) -> Iterator[Path]:
    """Gives a folder beside `out` to write into, which takes its name at the end.

    After an error of the input nothing is left. After an interruption, or where the file system refused, what was
    written stays in `.partial-<name>`, and the same job finds it there again; another job begins anew.

    Args:
        out: Missing or an empty folder.
        job: What is done, from what, as JSON values: all that the files' bytes depend on.

    Raises:
        ModelError: `out` is not empty, or the file system refuses.
    """
    check_output(out)
    partial = out.with_name(f'.partial-{out.name}')
    digest = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
    try:
        _prepare(partial, digest)
        yield partial
        (partial / _JOB_FILE).unlink()
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise ModelError(
            f'cannot write {out}: {error.strerror or error}; what is done is kept in {partial}, and the same command '
            'goes on with it'
        ) from error
    except XTunerError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _prepare(partial: Path, digest: str) -> None:
    """Keeps what an interrupted run of the same job has left, but for half-written files."""
    record = partial / _JOB_FILE
    if record.is_file() and record.read_text(encoding='utf-8').strip() == digest:
        for path in partial.glob('*.part'):
            path.unlink()
        return
    if partial.exists():
        logger.warning('%s was left by another job; it is removed', partial)
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    record.write_text(digest + '\n', encoding='utf-8')
