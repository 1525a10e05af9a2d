"""Writes a file of known size from several threads, bypassing the page cache (O_DIRECT) where possible.

Data that is written once only displaces other data from the page cache, and filling the cache costs more than the disk
write: half a CPU second per gigabyte. Direct I/O requires whole pages at page-aligned positions; the few bytes before
the first and after the last page go through the cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path

_PAGE = mmap.PAGESIZE  # 4 KiB, 64 KiB on some ARM machines: no page may be written both directly and through the cache
_BUFFER_BYTES = 2**22  # per thread; large enough to amortize the system call
_MIN_DIRECT_BYTES = 2**16  # smaller writes go through the page cache, which coalesces them

_local = threading.local()


class DirectIOWriter:
    """A new file, written at arbitrary positions by several threads.

    Args:
        path: The file, which is overwritten.
        num_bytes: Its size.

    Raises:
        OSError: The file cannot be created.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._file = path.open('w+b', buffering=0)
        self._lock = threading.Lock()
        self._direct = _open_direct(path)
        self._file.truncate(num_bytes)

    def write(self, position: int, pieces: Iterable[memoryview]) -> None:
        """Writes pieces consecutively from `position`; other threads may write elsewhere at the same time.

        Raises:
            OSError: The disk is full, or the write fails.
        """
        buffer = _thread_buffer()
        start = filled = position % _PAGE  # the buffer starts at a page of the file
        begin = position - start
        for piece in pieces:
            while piece:
                length = min(len(piece), _BUFFER_BYTES - filled)
                buffer[filled : filled + length] = piece[:length]
                piece = piece[length:]
                filled += length
                if filled == _BUFFER_BYTES:
                    self._write_buffer(buffer, start, filled, begin)
                    begin += _BUFFER_BYTES
                    start = filled = 0
        self._write_buffer(buffer, start, filled, begin)

    def flush(self) -> None:
        """Flushes the file to the disk (fsync)."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; no thread may write afterwards."""
        self._file.close()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _write_buffer(self, buffer: memoryview, start: int, stop: int, begin: int) -> None:
        """Writes a part of a buffer whose first byte belongs at file position `begin`."""
        first, last = -(-start // _PAGE) * _PAGE, stop // _PAGE * _PAGE
        if last - first >= _MIN_DIRECT_BYTES and self._write_direct(buffer[first:last], begin + first):
            self._write_cached(buffer[start:first], begin + start)
            self._write_cached(buffer[last:stop], begin + last)
        else:
            self._write_cached(buffer[start:stop], begin + start)

    def _write_direct(self, data: memoryview, position: int) -> bool:
        if self._direct is None:
            return False
        try:
            while data:
                length = os.pwrite(self._direct, data, position)
                data, position = data[length:], position + length
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False  # unsupported alignment; everything is written again through the cache
        return True

    def _write_cached(self, data: memoryview, position: int) -> None:
        with self._lock:
            self._file.seek(position)
            while data:
                data = data[self._file.write(data) :]


def _open_direct(path: Path) -> int | None:
    if not hasattr(os, 'O_DIRECT'):  # not Linux
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:  # a file system without O_DIRECT, such as tmpfs
        return None


def _thread_buffer() -> memoryview:
    """This thread's page-aligned buffer."""
    if not hasattr(_local, 'buffer'):
        _local.buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
    buffer: memoryview = _local.buffer
    return buffer
