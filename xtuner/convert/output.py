"""Output folders that appear only once complete; interrupted work is kept next to them and can be resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xtuner.errors import ModelError, XTunerError
from xtuner.utils.locks import is_at, try_lock

logger = logging.getLogger('xtuner')

_JOB_FILE = 'unfinished'  # holds a hash of the job


def check_output(out: Path) -> None:
    """Raises ModelError if `out` is a file, is not empty, or has a file as a parent."""
    check_parent(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f'{out} is not empty; nothing was written: name another folder or remove this one')


def check_parent(out: Path) -> None:
    """Raises ModelError if a parent of `out` is a file."""
    parent = next((folder for folder in out.absolute().parents if folder.exists()), None)
    if parent is not None and not parent.is_dir():
        raise ModelError(f'{out} cannot be created: {parent} is a file; nothing was written: name another path')


@contextmanager
def atomic_folder(out: Path, job: Any) -> Iterator[Path]:
    """Yields a temporary folder next to `out`, which is renamed to `out` at the end.

    After an error in the input, nothing remains. After an interruption or a file system error, the partial output
    remains in `.partial-<name>` and is resumed by the same job; another job starts from scratch.

    Args:
        out: A missing or empty folder.
        job: JSON values that identify the job: everything that the output depends on.

    Raises:
        ModelError: `out` is not empty, another process is writing it, or the file system refuses.
    """
    check_output(out)
    partial = out.with_name(f'.partial-{out.name}')
    digest = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(partial, out):
            _prepare_partial(partial, digest)
            try:
                yield partial
            except XTunerError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            (partial / _JOB_FILE).unlink()
            if out.exists():
                out.rmdir()
            partial.rename(out)
    except OSError as error:
        kept = f'partial output is kept in {partial}; the same command resumes it' if partial.is_dir() \
            else 'nothing was written'  # fmt: skip
        raise ModelError(f'cannot write {out}: {error.strerror or error}; {kept}') from error


@contextmanager
def _exclusive(partial: Path, out: Path) -> Iterator[None]:
    """Holds the lock file `<partial>.lock` for the block; the lock ends with the process.

    Raises:
        ModelError: Another process holds it.
    """
    lock = partial.with_name(f'{partial.name}.lock')
    with lock.open('a') as file:
        state = try_lock(file.fileno())
        # The other process holds the lock, or removed the file since it was opened here.
        if state == 'taken' or (state == 'ours' and not is_at(file.fileno(), lock)):
            raise ModelError(f'{out} is being written by another process; wait for it, or name another folder')
        try:
            yield
        finally:
            # Windows cannot remove an open file; elsewhere the lock must last until the file is removed.
            if state == 'no locks':
                file.close()
            with suppress(OSError):  # another process has it open; a leftover file locks nothing
                lock.unlink(missing_ok=True)


def _prepare_partial(partial: Path, digest: str) -> None:
    """Keeps the output of an interrupted run of the same job, except incomplete files."""
    record = partial / _JOB_FILE
    if record.is_file() and record.read_text(encoding='utf-8').strip() == digest:
        for path in partial.glob('*.part'):
            path.unlink()
        return
    if partial.exists():
        logger.warning('removing %s, left by another job', partial)
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    record.write_text(digest + '\n', encoding='utf-8')
