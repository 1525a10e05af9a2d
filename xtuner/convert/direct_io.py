"""A file whose size is known and whose parts several threads write, past the page cache where the file system can.

The page cache is memory of the machine that what is written once only takes from others, and filling it costs more
than the disk does: half a second of a processor for a gigabyte. Writing past it asks for whole pages at places that
are multiples of a page; the few bytes before the first and after the last go through the cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path

_PAGE = mmap.PAGESIZE  # 4 KiB, on some ARM machines 64: no page of the cache may be written both ways
_BUFFER_BYTES = 2**22  # of a thread; long enough that the disk's own time counts and not that of a call
_LEAST_DIRECT = 2**16  # fewer bytes go through the page cache, which gathers them

_local = threading.local()


class DirectIOWriter:
    """A new file.

    Args:
        path: Written over.
        num_bytes: Its size.

    Raises:
        OSError: the file system refuses.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._file = path.open('w+b', buffering=0)
        self._lock = threading.Lock()
        self._direct = _open_direct(path)
        self._file.truncate(num_bytes)

    def write(self, position: int, pieces: Iterable[memoryview]) -> None:
        """Writes pieces one after the other, the first at `position`; other threads may write elsewhere meanwhile.

        Raises:
            OSError: the disk is full, or the file system refuses.
        """
        buffer = _own_buffer()
        start = filled = position % _PAGE  # the buffer begins at a page of the file
        begin = position - start
        for piece in pieces:
            while piece:
                length = min(len(piece), _BUFFER_BYTES - filled)
                buffer[filled : filled + length] = piece[:length]
                piece = piece[length:]
                filled += length
                if filled == _BUFFER_BYTES:
                    self._put(buffer, start, filled, begin)
                    begin += _BUFFER_BYTES
                    start = filled = 0
        self._put(buffer, start, filled, begin)

    def flush(self) -> None:
        """Returns once all is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes it; no thread may write any more."""
        self._file.close()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _put(self, buffer: memoryview, start: int, stop: int, begin: int) -> None:
        """Writes a part of a buffer, whose first byte belongs at `begin`."""
        first, last = -(-start // _PAGE) * _PAGE, stop // _PAGE * _PAGE
        if last - first >= _LEAST_DIRECT and self._put_direct(buffer[first:last], begin + first):
            self._put_cached(buffer[start:first], begin + start)
            self._put_cached(buffer[last:stop], begin + last)
        else:
            self._put_cached(buffer[start:stop], begin + start)

    def _put_direct(self, data: memoryview, position: int) -> bool:
        if self._direct is None:
            return False
        try:
            while data:
                length = os.pwrite(self._direct, data, position)
                data, position = data[length:], position + length
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False  # other pages than ours; all of it is written again, through the cache
        return True

    def _put_cached(self, data: memoryview, position: int) -> None:
        with self._lock:
            self._file.seek(position)
            while data:
                data = data[self._file.write(data) :]


def _open_direct(path: Path) -> int | None:
    if not hasattr(os, 'O_DIRECT'):  # not Linux
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:  # a file system that cannot, such as one in memory
        return None


def _own_buffer() -> memoryview:
    """This thread's buffer, which begins at a page of the memory."""
    if not hasattr(_local, 'buffer'):
        _local.buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
    buffer: memoryview = _local.buffer
    return buffer
