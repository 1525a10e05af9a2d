"""Parts of a file, wherever they begin and end, past the page cache and through it."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from xtuner.convert import direct_io
from xtuner.convert.direct_io import DirectIOWriter

pytestmark = pytest.mark.unit

SIZES = (5, 4096, 70_001, 9_000_000, 65_536, 4_194_304, 123, 200_000)  # of neighbouring parts, from byte 77 on


def write(path: Path) -> bytes:
    """Four threads write the parts, each in pieces; what the file shall hold."""
    parts = [os.urandom(size) for size in SIZES]
    whole = b'\0' * 77 + b''.join(parts)
    file = DirectIOWriter(path, len(whole))

    def put(number: int) -> None:
        part = memoryview(parts[number])
        pieces = [part[i : i + 333_333] for i in range(0, len(part), 333_333)]
        file.write(77 + sum(SIZES[:number]), pieces)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, reversed(range(len(SIZES)))))
    file.flush()
    file.close()
    return whole


@pytest.mark.torch
def test_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = []
    put = DirectIOWriter._write_direct

    def counted(self: DirectIOWriter, data: memoryview, position: int) -> bool:
        direct.append(done := put(self, data, position))
        return done

    monkeypatch.setattr(DirectIOWriter, '_write_direct', counted)
    whole = write(tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == whole
    assert len(direct) == 6  # three buffers of the largest part, one each of three more; the others are short


def test_where_the_file_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, '_open_direct', lambda path: None)
    assert write(tmp_path / 'a') == (tmp_path / 'a').read_bytes()
    monkeypatch.undo()

    def refuse(*arguments: object) -> int:
        raise OSError(errno.EINVAL, 'pages of another size')

    monkeypatch.setattr(direct_io.os, 'pwrite', refuse)
    assert write(tmp_path / 'b') == (tmp_path / 'b').read_bytes()


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, 'no space left')

    monkeypatch.setattr(direct_io.os, 'pwrite', refuse)
    monkeypatch.setattr(direct_io, '_open_direct', lambda path: os.open(path, os.O_WRONLY))
    with pytest.raises(OSError, match='no space left'):
        write(tmp_path / 'file')
