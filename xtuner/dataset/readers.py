"""Files -> records, one at a time: the file may be larger than memory, a record may not.

A record that cannot be read carries its error instead of a value; nothing here raises for one, and what follows it is
read on. Origins are `file:line`, or `file[row]` where a format has no lines.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from xtuner.errors import DataError, nearest
from xtuner.files import check_regular

MAX_RECORD_BYTES = 32 * 2**20
_BLOCK = 2**20
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_WIDE = '; the file is UTF-16: save it as UTF-8'
_LONGEST_WORD = len('-Infinity')  # a word of JSON that is cut off is wrong from its beginning


@dataclass(frozen=True, slots=True)
class Record:
    """One raw record: where it stands, and its value or what is wrong with it."""

    origin: str
    value: Any = None
    error: str = ''


def read_file(path: Path) -> Iterator[Record]:
    """Yields the records of a JSON, JSONL, CSV, TSV or parquet file.

    Raises:
        DataError: Where the file does not exist, cannot be opened, or is of no known kind.
    """
    suffix = path.suffix.lower()
    reader = READERS.get(suffix)
    if reader is None:
        raise DataError(
            f'{path}: unknown kind of file {suffix!r}{nearest(suffix, READERS)}; known: {", ".join(READERS)}'
        )
    if path.exists():
        check_regular(path, DataError)
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror or error}') from None


def parse(text: bytes, origin: str) -> Record:
    """Parses one JSON value from UTF-8 bytes."""
    try:
        value = json.loads(text.decode('utf-8'))
        if b'\\ud' in text or b'\\uD' in text:
            json.dumps(value, ensure_ascii=False).encode('utf-8')
    except UnicodeDecodeError as error:
        wide = _WIDE if text.startswith(_UTF16) else ''
        return Record(origin, error=f'not UTF-8: byte 0x{text[error.start]:02x} at column {error.start + 1}{wide}')
    except UnicodeEncodeError:
        return Record(origin, error='holds half of a surrogate pair, which is no character')
    except json.JSONDecodeError as error:
        return Record(origin, error=f'not JSON: {error.msg} at column {error.pos + 1}')
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting of thousands of levels
        return Record(origin, error=f'not usable JSON: {error}')
    return Record(origin, value)


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open('rb') as file:
        for number, line in enumerate(_lines(file), start=1):
            origin = f'{path}:{number}'
            if line is None:
                yield Record(origin, error=f'longer than {MAX_RECORD_BYTES // 2**20} MiB')
            elif line and not line.isspace():
                yield parse(line, origin)


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yields lines, without a byte order mark; None for a line longer than a record may be."""
    first = True
    while line := file.readline(MAX_RECORD_BYTES + 1):
        if first:
            line, first = line.removeprefix(b'\xef\xbb\xbf'), False
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b'\n'):
                line = file.readline(_BLOCK)
            yield None
        else:
            yield line


def _read_json(path: Path) -> Iterator[Record]:
    """Reads a JSON list of records; a file of one record a line is read as JSONL, whatever its name."""
    with path.open('rb') as file:
        start = file.read(_BLOCK).removeprefix(b'\xef\xbb\xbf').lstrip()
    if start.startswith(b'['):
        yield from _read_list(path)
    elif not start:
        return
    elif _is_one_record_a_line(start):
        yield from _read_jsonl(path)
    else:
        yield Record(f'{path}:1', error='neither a list of records nor one record a line; write it as '
                     '`[{...}, {...}]` or as JSONL')  # fmt: skip


def _is_one_record_a_line(start: bytes) -> bool:
    first, _, rest = start.partition(b'\n')
    return first.rstrip().endswith(b'}') and not (
        first.strip() == b'{' or (rest and not rest.lstrip().startswith(b'{'))
    )


def _read_list(path: Path) -> Iterator[Record]:
    """Reads the elements of a JSON list one by one. What follows a broken element cannot be told apart from it."""
    decoder = json.JSONDecoder()
    with path.open('r', encoding='utf-8-sig', errors='surrogateescape', newline='') as file:
        text, line = '', 1
        for char in iter(lambda: file.read(1), '['):  # up to the beginning of the list
            line += char == '\n'
        while True:
            stripped = text.lstrip(' \t\r\n,')
            line += text.count('\n', 0, len(text) - len(stripped))
            text = stripped
            if not text:
                text = file.read(_BLOCK)
                if not text:
                    yield Record(f'{path}:{line}', error='the file ends in the middle of the list')
                    return
                continue
            if text[0] == ']':
                return
            origin = f'{path}:{line}'
            value, used, text = _element(decoder, text, file)
            if used == 0:
                if not value:  # the file is cut off here: nothing follows that could be lost
                    yield Record(origin, error='the file ends in the middle of a record')
                    return
                raise DataError(f'{origin}: not JSON: {value}; what follows in the list cannot be told apart from it: '
                                'mend it there, or write one record a line (JSONL)')  # fmt: skip
            yield _utf8(value, origin)
            line += text.count('\n', 0, used)
            text = text[used:]


def _element(decoder: json.JSONDecoder, text: str, file: io.TextIOWrapper) -> tuple[Any, int, str]:
    """Decodes one element, reading on as far as it goes.

    Returns `(value, characters used, text read so far)`; with nothing used, the value is what is wrong, '' where the
    file just ends.
    """
    step = _BLOCK
    while True:
        try:
            value, used = decoder.raw_decode(text)
            # A number may go on behind the block; everything else knows its own end.
            if used < len(text) or not isinstance(value, (int, float)):
                return value, used, text
            reason = ''
        except json.JSONDecodeError as error:
            cut_off = error.msg.startswith('Unterminated string') or error.pos >= len(text.rstrip()) - _LONGEST_WORD
            reason = '' if cut_off else error.msg
        except (ValueError, RecursionError) as error:
            reason = str(error)
        more = file.read(step) if len(text) <= MAX_RECORD_BYTES else ''
        if not more:
            if len(text) > MAX_RECORD_BYTES:
                reason = reason or f'a record longer than {MAX_RECORD_BYTES // 2**20} MiB'
            return reason, 0, text
        text, step = text + more, step * 2  # doubling: a long record is decoded again only a few times


def _utf8(value: Any, origin: str) -> Record:
    try:
        json.dumps(value, ensure_ascii=False).encode('utf-8')
    except (UnicodeEncodeError, RecursionError):
        return Record(origin, error='holds bytes that are not UTF-8')
    return Record(origin, value)


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    with path.open('rb') as start:
        if (two := start.read(2)) in _UTF16:
            yield Record(f'{path}:1', error=f'not UTF-8: byte 0x{two[0]:02x} at column 1{_WIDE}')
            return
    delimiter = '\t' if path.suffix.lower() == '.tsv' else ','
    with path.open('r', encoding='utf-8-sig', errors='surrogateescape', newline='') as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            origin = f'{path}:{reader.line_num + 1}'
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield Record(origin, error=f'not CSV: {error}')
                continue
            if row is None:
                return
            if header is None:
                header = row
            elif row and len(row) != len(header):
                columns = f'{len(row)} column{"" if len(row) == 1 else "s"}'
                yield Record(origin, error=f'has {columns}, the header has {len(header)}')
            elif row:
                yield _utf8(dict(zip(header, row, strict=True)), origin)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=512):
                for value in batch.to_pylist():
                    yield Record(f'{path}[{row}]', value)
                    row += 1
    except (pyarrow.ArrowException, ValueError) as error:
        yield Record(f'{path}[{row}]', error=f'not parquet: {error}')


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    '.jsonl': _read_jsonl, '.json': _read_json, '.csv': _read_csv, '.tsv': _read_csv, '.parquet': _read_parquet,
}  # fmt: skip
