"""Opens data files: detects format and compression, and checks that a file does not change while it is read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from xtuner.errors import DataError, nearest, one_line
from xtuner.utils.files import check_regular

TEXT_KINDS = ('.jsonl', '.json', '.csv', '.tsv')
KINDS = (*TEXT_KINDS, '.parquet')


_BUFFER = 2**17
COMPRESSED = ('.gz', '.bz2', '.xz', '.zst')


def kind_of_file(path: Path) -> str:
    """Returns the format of a data file, such as '.jsonl' for `a.jsonl` and `a.jsonl.gz`.

    Raises:
        DataError: The format is unknown.
    """
    if is_data_file(path):
        suffixes = [suffix.lower() for suffix in path.suffixes]
        return suffixes[-2] if suffixes[-1] in COMPRESSED else suffixes[-1]
    if path.suffix.lower() == '.txt':
        raise DataError(f'{path}: plain text is not supported: it does not mark where a document ends; '
                        'write each document as a JSON line {"text": "..."} for the format `pretrain`')  # fmt: skip
    known = [*KINDS, *(kind + packed for kind in TEXT_KINDS for packed in COMPRESSED)]
    suffix = ''.join(path.suffixes[-2:]) if path.suffix.lower() in COMPRESSED else path.suffix.lower()
    raise DataError(f'{path}: unknown file format {suffix!r}{nearest(suffix, known)}; known: {known_kinds()}')


def known_kinds() -> str:
    """The supported file formats, for messages."""
    return f'{", ".join(KINDS)}, all but the last also with {", ".join(COMPRESSED)}'


def is_data_file(path: Path) -> bool:
    """Whether a file is data, judged by its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        return len(suffixes) > 1 and suffixes[-2] in TEXT_KINDS
    return bool(suffixes) and suffixes[-1] in KINDS


def check_data_file(path: Path) -> os.stat_result:
    """Returns the stat of a file, which must be a regular file, because data is read more than once.

    Raises:
        DataError: It is a pipe, a device, a folder or a broken link, or cannot be accessed.
    """
    return check_regular(path, DataError, '; data is read more than once, so write it into a file first')


Advance = Callable[[int], object]
"""Gets the number of bytes of a file, or of records, that were read since its last call."""


@contextmanager
def opened(path: Path, advance: Advance | None = None) -> Iterator[BinaryIO]:
    """Opens a data file, decompressing it if its name says that it is compressed.

    Args:
        path: The file.
        advance: Gets the bytes that are read, before they are decompressed.

    Raises:
        DataError: It cannot be read, is damaged, or changes while it is read.
    """
    with unchanging(path):
        try:
            raw = path.open('rb') if advance is None else io.BufferedReader(_Counted(path, advance), _BUFFER)
            with raw, _decompressed(raw, path.suffix.lower()) as file:
                yield file
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f'{path}: the compressed file is damaged or truncated: {one_line(error)}') from None


class _Counted(io.FileIO):
    """A file that says how many bytes were read from it."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: Any) -> int:
        """Reads into the buffer; returns the number of bytes, 0 at the end."""
        count = super().readinto(buffer) or 0
        self._advance(count)
        return count


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == '.gz':
        return cast(BinaryIO, gzip.open(raw))
    if suffix in ('.bz2', '.xz'):
        return cast(BinaryIO, (bz2 if suffix == '.bz2' else lzma).open(raw))
    if suffix == '.zst':
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(raw, compression='zstd'))
    return raw


@contextmanager
def unchanging(path: Path) -> Iterator[None]:
    """Raises DataError if the file changes within the block."""
    before = check_data_file(path)
    yield
    after = check_data_file(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f'{path}: changed while being read (from {before.st_size:,} to {after.st_size:,} bytes); '
                        'retry once it is complete')  # fmt: skip


def as_text(file: BinaryIO) -> io.TextIOWrapper:
    """Wraps a binary file as UTF-8 text with unchanged line breaks; bytes that are not UTF-8 become surrogates."""
    return io.TextIOWrapper(file, encoding='utf-8-sig', errors='surrogateescape', newline='')
