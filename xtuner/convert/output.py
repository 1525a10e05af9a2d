"""A folder that appears as a whole, or not at all; interrupted work is kept beside it and gone on with."""

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
    """Raises ModelError where `out` is a file, holds anything, or lies beneath a file."""
    check_above(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f'{out} is not empty; nothing was written: name another folder or remove it')


def check_above(out: Path) -> None:
    """Raises ModelError where `out` lies beneath a file."""
    above = next((folder for folder in out.absolute().parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise ModelError(f'{out} cannot be made: {above} is a file; nothing was written: name another path')


@contextmanager
def whole_folder(out: Path, job: Any) -> Iterator[Path]:
    """Gives a folder beside `out` to write into, which takes its name at the end.

    After an error of the input nothing is left. After an interruption, or where the file system refused, what was
    written stays in `.partial-<name>`, and the same job finds it there again; another job begins anew.

    Args:
        out: Missing or an empty folder.
        job: What is done, from what, as JSON values: all that the files' bytes depend on.

    Raises:
        ModelError: `out` is not empty, another process writes it, or the file system refuses.
    """
    check_output(out)
    partial = out.with_name(f'.partial-{out.name}')
    digest = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(partial, out):
            _prepare(partial, digest)
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
        kept = f'what is done is kept in {partial}, and the same command goes on with it' if partial.is_dir() \
            else 'nothing was written'  # fmt: skip
        raise ModelError(f'cannot write {out}: {error.strerror or error}; {kept}') from error


@contextmanager
def _alone(partial: Path, out: Path) -> Iterator[None]:
    """Holds the lock on `<partial>.lock`, which ends with its process.

    Raises:
        ModelError: another process holds it.
    """
    lock = partial.with_name(f'{partial.name}.lock')
    with lock.open('a') as file:
        state = try_lock(file.fileno())
        if state == 'taken' or (state == 'ours' and not is_at(file.fileno(), lock)):
            raise ModelError(f'{out} is being written by another process; wait for its end, or name another folder')
        try:
            yield
        finally:
            if state == 'no locks':  # as on Windows, which removes no open file; a lock must outlast its file
                file.close()
            with suppress(OSError):  # another process has it open; a file that stays locks nothing
                lock.unlink(missing_ok=True)


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
