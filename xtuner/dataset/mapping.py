"""Records -> conversations: calls the map function, and turns whatever goes wrong into a message with file and line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.conversation import Conversation, to_conversation
from xtuner.dataset.map_fns import detect_map_fn, nearest_format, resolve_map_fn
from xtuner.dataset.map_fns.registration import MapFn
from xtuner.dataset.readers import Record
from xtuner.dataset.sources import Source
from xtuner.dataset.summary import Summary
from xtuner.errors import DataError


def map_records(source: Source, config: DatasetConfig, summary: Summary) -> Iterator[Conversation]:
    """Yields the conversations of a source; counts records, and what is bad or left out, in `summary`.

    Raises:
        DataError: For the first bad record, under `on_bad_record='error'`.
        ConfigError: Where the map function does not exist, or no format is detected.
    """
    chosen = source.map_fn or config.map_fn
    function = resolve_map_fn(chosen) if chosen is not None else None
    ids = _Ids(config.unique_id)
    for record in source.records():
        summary.records += 1
        try:
            if record.error:
                raise DataError(f'{record.origin}: {record.error}')
            if function is None:
                function = detect_map_fn(record.value, record.origin)
                name = getattr(function, '__name__', str(function))
                summary.formats[source.name] = f'detected as {name.removesuffix("_map_fn")}'
            ids.check(record)
            conversations = apply_map_fn(function, record)
        except DataError as error:
            if config.on_bad_record == 'error':
                raise stopped_by(error) from None
            summary.lose('bad', str(error))
            continue
        if not conversations:
            summary.lose('left_out', record.origin)
        summary.conversations += len(conversations)
        yield from conversations


def stopped_by(error: DataError) -> DataError:
    """Returns the error of a record that stops the preparation, with the way to go on."""
    return DataError(f"{error} (`dataset.on_bad_record='skip'` leaves such records out)")


def apply_map_fn(function: MapFn, record: Record) -> list[Conversation]:
    """Returns the conversations that a map function makes of a record, checked; none where it leaves the record out.

    Raises:
        DataError: Where the map function fails or returns something else; names the columns of the record.
    """
    if not isinstance(record.value, Mapping):
        raise DataError(f'{record.origin}: a record must be a dict, got {type(record.value).__name__}')
    try:
        found = function(dict(record.value))
    except DataError as error:
        raise DataError(f'{record.origin}: {error}') from None
    except Exception as error:  # the user's own function may raise anything
        raise DataError(_explain(function, record, error)) from None
    results = found if isinstance(found, list) else [found]
    return [to_conversation(result, record.origin) for result in results if not _is_left_out(result)]


def _is_left_out(result: Any) -> bool:
    return result is None or (isinstance(result, Mapping) and result.get('conversation', True) in ([], ()))


def _explain(function: MapFn, record: Record, error: Exception) -> str:
    name = getattr(function, '__name__', str(function))
    columns = ', '.join(sorted(map(str, record.value))) or 'none'
    needed = getattr(function, 'columns', None)
    missing = [column for column in needed or () if column not in record.value]
    if missing:
        return (f'{record.origin}: `{name}` needs the column{"s" if len(missing) > 1 else ""} {", ".join(missing)}; '
                f'found {columns}; {nearest_format(record.value)}')  # fmt: skip
    return (
        f'{record.origin}: `{name}` failed with {type(error).__name__}: {error}; the record has the columns {columns}'
    )


class _Ids:
    """The values of the unique field so far: 8 bytes of hash each, for the records that have one."""

    def __init__(self, field: str | None) -> None:
        self._field = field
        self._seen: set[bytes] = set()

    def check(self, record: Record) -> None:
        """Raises DataError for a value that came before."""
        if self._field is None or not isinstance(record.value, Mapping):
            return
        value = record.value.get(self._field)
        if value is None or value == '':
            return
        key = hashlib.blake2b(repr(value).encode('utf-8', 'replace'), digest_size=8).digest()
        if key in self._seen:
            raise DataError(f'{record.origin}: `{self._field}` {str(value)[:60]!r} occurred before; set '
                            '`dataset.unique_id = None` where it need not be unique')  # fmt: skip
        self._seen.add(key)
