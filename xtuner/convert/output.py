"""A folder that appears as a whole, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xtuner.errors import ModelError


def check_output(out: Path) -> None:
    """Raises ModelError where `out` is a file or holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f'{out} is not empty; nothing was written: name another folder or remove it')


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a folder beside `out` to write into, which takes its name at the end; after an error nothing is left.

    Args:
        out: Missing or an empty folder.

    Raises:
        ModelError: `out` is not empty, or the file system refuses.
    """
    check_output(out)
    partial = out.with_name(f'.partial-{out.name}')
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise ModelError(f'cannot write {out}: {error.strerror or error}') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
