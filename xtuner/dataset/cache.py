"""Prepared once: one process builds a folder, all others wait for it without any collective that could time out."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from xtuner.files import expanded

_BEAT_S = 2.0  # how often the owner of a lock says that it lives
_STALE_S = 30.0  # after which silence, by the waiting process's own clock, its lock is taken over
_POLL_S = 0.2


def cache_root(configured: str | None = None) -> Path:
    """Returns where prepared data is kept: as configured, else `$XTUNER_CACHE`, else `~/.cache/xtuner`."""
    return expanded(configured or os.environ.get('XTUNER_CACHE') or '~/.cache/xtuner')


def build_once(
    folder: Path,
    build: Callable[[Path], None],
    *,
    is_complete: Callable[[Path], bool],
    waiting: Callable[[], None] = lambda: None,
) -> bool:
    """Makes sure that `folder` exists and is complete; returns whether this process built it.

    `build` writes into a folder beside it, which takes its name only when all is written: an interruption leaves
    nothing that looks like a result. Processes that come while another builds wait for that one, for as long as it
    lives; the one after a builder that failed or died tries itself.

    Args:
        folder: What is to exist.
        build: Writes the content into the folder it is given.
        is_complete: Whether a folder is a result.
        waiting: Called once when there is another to wait for.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f'{folder.name}.lock')
    said, silence = False, _Silence(lock)
    while not is_complete(folder):
        if not _take(lock, silence):
            if not said:
                waiting()
                said = True
            time.sleep(_POLL_S)
            continue
        with _held(lock):
            if is_complete(folder):
                return False
            _build(folder, build)
            return True
    return False


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    for left in folder.parent.glob(f'{folder.name}.part-*'):  # of builders that were killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    part = folder.with_name(f'{folder.name}.part-{socket.gethostname()}-{os.getpid()}')
    try:
        build(part)
        if folder.exists():  # torn by something else than us
            shutil.rmtree(folder)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Silence:
    """How long the owner of a lock has said nothing, whatever happens to the clocks that files are stamped with."""

    def __init__(self, lock: Path) -> None:
        self._lock, self._stamp, self._since = lock, -1, 0.0

    def seconds(self) -> float:
        """Since this process first saw the lock's present stamp."""
        stamp = self._lock.stat().st_mtime_ns
        if stamp != self._stamp:
            self._stamp, self._since = stamp, time.monotonic()
        return time.monotonic() - self._since


def _take(lock: Path, silence: _Silence) -> bool:
    """Takes the lock where it is free or its owner is dead."""
    try:
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        if _is_dead(lock, silence):
            with contextlib.suppress(OSError):
                lock.unlink()
        return False
    with os.fdopen(descriptor, 'w') as file:
        file.write(f'{socket.gethostname()} {os.getpid()}')
    return True


def _is_dead(lock: Path, silence: _Silence) -> bool:
    try:
        if silence.seconds() > _STALE_S:
            return True
        host, _, pid = lock.read_text().partition(' ')
    except OSError:
        return False
    if os.name != 'posix' or host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Keeps the lock fresh while the block runs, and gives it back."""
    done = threading.Event()

    def beat() -> None:
        """Touches the lock until the block is done: others take over one that is silent."""
        while not done.wait(_BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(lock)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        lock.unlink(missing_ok=True)
