"""A limit on a process's memory that the kernel enforces: a control group of its own, version 1 or 2, as root.

The page cache of files that the process reads and writes counts, and is given back under pressure; what cannot be given
back beyond the limit gets the process killed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path('/sys/fs/cgroup')
_TRIES = 50  # to remove a group whose last process is still going


@dataclass(frozen=True)
class Usage:
    """What a group's processes used.

    Attributes:
        peak: Most bytes at a time, page cache included.
        at_limit: How often the limit was reached, and memory given back for it.
        killed: How many processes the kernel killed.
    """

    peak: int
    at_limit: int
    killed: int


class MemoryLimit:
    """A control group with a limit, removed at the end of the `with` block.

    Args:
        num_bytes: The limit; nothing may be swapped beyond it.

    Raises:
        SystemExit: it cannot be enforced here, with the reason.
    """

    def __init__(self, num_bytes: int) -> None:
        old = (_ROOT / 'memory' / 'memory.limit_in_bytes').is_file()
        self._folder = (_ROOT / 'memory' if old else _ROOT) / f'xtuner-benchmark-{os.getpid()}'
        self._old = old
        limit = 'memory.limit_in_bytes' if old else 'memory.max'
        try:
            if not old and 'memory' not in (_ROOT / 'cgroup.controllers').read_text(encoding='ascii').split():
                raise OSError('there is no memory controller')
            self._folder.mkdir()
            (self._folder / limit).write_text(f'{num_bytes}\n', encoding='ascii')
        except OSError as error:
            raise SystemExit(
                f'--memory-limit cannot be enforced here: {self._folder}: {error.strerror or error}; it needs root '
                'and a memory controller of control groups that may be written'
            ) from error

    def __enter__(self) -> MemoryLimit:
        return self

    def __exit__(self, *error: object) -> None:
        for _ in range(_TRIES):
            try:
                return self._folder.rmdir()
            except OSError:
                time.sleep(0.1)

    def command(self, words: Sequence[str]) -> list[str]:
        """A command line that runs within the limit."""
        return ['sh', '-c', 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self._folder), *words]

    def usage(self) -> Usage:
        """What was used so far."""
        if self._old:
            peak, at_limit = (self._number(name) for name in ('memory.max_usage_in_bytes', 'memory.failcnt'))
            return Usage(peak, at_limit, self._table('memory.oom_control')['oom_kill'])
        events = self._table('memory.events')
        return Usage(self._number('memory.peak'), events['max'], events['oom_kill'])

    def _number(self, name: str) -> int:
        return int((self._folder / name).read_text(encoding='ascii'))

    def _table(self, name: str) -> dict[str, int]:
        lines = (self._folder / name).read_text(encoding='ascii').splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}


def forget_pages(folder: Path) -> None:
    """Takes a folder's files out of the page cache, so that reading them counts anew."""
    for path in folder.iterdir():
        with path.open('rb') as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
