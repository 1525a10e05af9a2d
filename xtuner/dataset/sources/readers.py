"""Reads files as a stream of records: a file may be larger than memory, a single record may not.

A record that cannot be read carries an error instead of a value; reading continues with the next one. Origins are
`file:line`, or `file[row]` for formats without lines.
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

from xtuner.dataset.sources.files import Advance, as_text, kind_of_file, opened, unchanging
from xtuner.errors import DataError, one_line

MAX_RECORD_BYTES = 32 * 2**20
_BLOCK = 2**20
_BOM = codecs.BOM_UTF8
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_WIDE = '; the file is UTF-16: save it as UTF-8'
_LONGEST_WORD = len('-Infinity')  # JSON reports a truncated literal at its start


@dataclass(frozen=True, slots=True)
class Record:
    """One raw record: its origin, and its value or an error."""

    origin: str
    value: Any = None
    error: str = ''


def read_file(path: Path, advance: Advance | None = None) -> Iterator[Record]:
    """Yields the records of a JSON, JSONL, CSV, TSV or parquet file; the text formats may be compressed.

    Args:
        path: The file.
        advance: Gets the number of bytes of the file that were read since its last call.

    Raises:
        DataError: The file does not exist, cannot be opened, has an unknown format, or changes while it is read.
    """
    reader = READERS[kind_of_file(path)]
    try:
        yield from reader(path, advance)
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror or one_line(error)}') from None


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
        return Record(origin, error='contains a lone surrogate, which is not a character')
    except json.JSONDecodeError as error:
        return Record(origin, error=f'not JSON: {error.msg} at column {error.pos + 1}')
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting of thousands of levels
        return Record(origin, error=f'invalid JSON: {error}')
    return Record(origin, value)


def _read_jsonl(path: Path, advance: Advance | None) -> Iterator[Record]:
    if _is_list(path):
        yield from _read_list(path, advance)
        return
    with opened(path, advance) as file:
        for number, line in enumerate(_lines(file), start=1):
            origin = f'{path}:{number}'
            if line is None:
                yield Record(origin, error=f'longer than {MAX_RECORD_BYTES // 2**20} MiB')
            elif line and not line.isspace():
                yield parse(line, origin)


def _is_list(path: Path) -> bool:
    """Whether a file is one JSON list, rather than JSON lines of which the first is a list."""
    character, first, second = _beginning(path)
    return character == b'[' and not (second != b'' and first is not None and not parse(first, '').error)


def _beginning(path: Path) -> tuple[bytes, bytes | None, bytes | None]:
    """Returns the first character of a file and its first two non-empty lines; None for a line over the size limit."""
    with opened(path) as file:
        character = file.read(_BLOCK).removeprefix(_BOM).lstrip()[:1]
    with opened(path) as file:
        lines = (line for line in _lines(file) if line is None or line.strip())
        return character, next(lines, b''), next(lines, b'')


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yields lines without a byte order mark; None for a line over the record size limit."""
    first = True
    while line := file.readline(MAX_RECORD_BYTES + 1):
        if first:
            line, first = line.removeprefix(_BOM), False
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b'\n'):
                line = file.readline(_BLOCK)
            yield None
        else:
            yield line


def _read_json(path: Path, advance: Advance | None) -> Iterator[Record]:
    """Reads a JSON list of records; a file with one record per line is read as JSONL, whatever its name."""
    character, first, second = _beginning(path)
    if character == b'[':
        yield from _read_list(path, advance)
    elif first == b'' or _is_one_record_a_line(first, second):
        yield from _read_jsonl(path, advance)
    else:
        yield Record(f'{path}:1', error='neither a list of records nor one record per line; write it as '
                     '`[{...}, {...}]` or as JSONL')  # fmt: skip


def _is_one_record_a_line(first: bytes | None, second: bytes | None) -> bool:
    """Decides by the first two non-empty lines; None for a line over the record size limit."""
    if first is None or not first.rstrip().endswith(b'}') or first.strip() == b'{':
        return first is None and second is not None and second.lstrip().startswith(b'{')
    return not second or second.lstrip().startswith(b'{')


def _read_list(path: Path, advance: Advance | None) -> Iterator[Record]:
    """Reads the elements of a JSON list one by one; after a malformed element the rest cannot be parsed."""
    decoder = json.JSONDecoder()
    with opened(path, advance) as binary:
        file = as_text(binary)
        text, line = '', 1
        for char in iter(lambda: file.read(1), '['):  # up to the start of the list
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
                if not _is_blank(text[1:], file):
                    yield Record(f'{path}:{line}', error='unexpected content after the end of the list')
                return
            origin = f'{path}:{line}'
            value, used, text = _element(decoder, text, file)
            if used == 0:
                if not value:  # the file is truncated here, so no later record is lost
                    yield Record(origin, error='the file ends in the middle of a record')
                    return
                raise DataError(f'{origin}: not JSON: {value}; the rest of the list cannot be parsed: '
                                'fix it there, or write one record per line (JSONL)')  # fmt: skip
            yield _utf8(value, origin)
            line += text.count('\n', 0, used)
            text = text[used:]


def _is_blank(text: str, file: io.TextIOWrapper) -> bool:
    """Whether only white space follows."""
    while not text.strip():
        text = file.read(_BLOCK)
        if not text:
            return True
    return False


def _element(decoder: json.JSONDecoder, text: str, file: io.TextIOWrapper) -> tuple[Any, int, str]:
    """Decodes one element, reading more of the file as needed.

    Returns `(value, characters used, text read so far)`; with 0 characters used, the value is the error, '' if the
    file is truncated.
    """
    step = _BLOCK
    while True:
        try:
            value, used = decoder.raw_decode(text)
            # A number may continue after the block; other values have an end delimiter.
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
                reason = reason or f'the record is longer than {MAX_RECORD_BYTES // 2**20} MiB'
            return reason, 0, text
        text, step = text + more, step * 2  # doubling: a long record is decoded only a few times


def _utf8(value: Any, origin: str) -> Record:
    try:
        json.dumps(value, ensure_ascii=False).encode('utf-8')
    except (UnicodeEncodeError, RecursionError):
        return Record(origin, error='contains bytes that are not UTF-8')
    return Record(origin, value)


def _read_csv(path: Path, advance: Advance | None) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    with opened(path) as binary:
        start = binary.read(2)
    if start in _UTF16:
        yield Record(f'{path}:1', error=f'not UTF-8: byte 0x{start[0]:02x} at column 1{_WIDE}')
        return
    delimiter = '\t' if kind_of_file(path) == '.tsv' else ','
    with opened(path, advance) as binary:
        reader = csv.reader(as_text(binary), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            first = reader.line_num + 1
            origin = f'{path}:{first}'
            try:
                row = next(reader, None)
            except csv.Error as error:
                if 'unexpected end of data' in str(error):
                    raise DataError(
                        f'{origin}: a quote opened here is never closed, so the rest of the file is '
                        'inside it: close it, or double it if it is a literal quote'
                    ) from None
                lines = f' (lines {first} to {reader.line_num})' if reader.line_num > first else ''
                yield Record(origin, error=f'not CSV: {error}{lines}')
                continue
            if row is None:
                return
            if header is None:
                header = row
            elif row and len(row) != len(header):
                columns = f'{len(row)} column{"" if len(row) == 1 else "s"}'
                yield Record(origin, error=f'the row has {columns}, the header {len(header)}')
            elif row:
                yield _utf8(dict(zip(header, row, strict=True)), origin)


def _read_parquet(path: Path, advance: Advance | None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with unchanging(path), pyarrow.parquet.ParquetFile(path) as file:
            row_bytes = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=512):
                if advance is not None:
                    advance(round(batch.num_rows * row_bytes))
                for value in batch.to_pylist():
                    yield Record(f'{path}[{row}]', value)
                    row += 1
    except DataError:  # the file changed
        raise
    except (pyarrow.ArrowException, ValueError) as error:
        yield Record(f'{path}[{row}]', error=f'not parquet: {error}')


READERS: dict[str, Callable[[Path, Advance | None], Iterator[Record]]] = {
    '.jsonl': _read_jsonl, '.json': _read_json, '.csv': _read_csv, '.tsv': _read_csv, '.parquet': _read_parquet,
}  # fmt: skip
