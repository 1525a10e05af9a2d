"""Records -> conversations: calls the map function, and turns whatever goes wrong into a message with file and line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.conversation import Conversation, to_conversation
from xtuner.dataset.map_fns import detect_map_fn, nearest_format, resolve_map_fn
from xtuner.dataset.map_fns.registration import MapFn
from xtuner.dataset.mapping.unread_columns import check_columns
from xtuner.dataset.mapping.unread_fields import Observed, check_extras, from_tokenizer, unused, without
from xtuner.dataset.sources.readers import Record
from xtuner.dataset.sources.source import Source
from xtuner.dataset.summary import Summary
from xtuner.dataset.templates.template import Template
from xtuner.errors import DataError, one_line
from xtuner.utils.progress import Progress


def map_records(source: Source, config: DatasetConfig, summary: Summary, template: Template) -> Iterator[Conversation]:
    """Yields the conversations of a source; counts records, and what is bad, unused or left out, in `summary`.

    Raises:
        DataError: For the first bad record, under `on_bad_record='error'`.
        ConfigError: Where the map function does not exist, or no format is detected.
    """
    chosen = source.map_fn or config.map_fn
    function = resolve_map_fn(chosen) if chosen is not None else None
    ids, fields = _Ids(config.unique_id), _Fields(frozenset(config.ignore), template, summary)
    summary.notes += [note for note in source.notes if note not in summary.notes]
    for record in _read(source):
        summary.records += 1
        try:
            if record.error:
                raise DataError(f'{record.origin}: {record.error}')
            if function is None:
                function = detect_map_fn(visible_fields(record, config.ignore), record.origin)
                summary.formats[source.name] = f'detected as {function_name(function).removesuffix("_map_fn")}'
            ids.check(record)
            conversations = fields.map(function, record)
        except DataError as error:
            if config.on_bad_record == 'error':
                raise stopped_by(error) from None
            summary.record_drop('bad', str(error))
            continue
        if not conversations:
            summary.record_drop('left_out', record.origin)
        summary.conversations += len(conversations)
        yield from conversations


def _read(source: Source) -> Iterator[Record]:
    """The records of a source, with progress."""
    with Progress(total=source.total, desc=f'reading {source.name}', unit=source.unit) as progress:
        yield from source.records(progress.update)


def stopped_by(error: DataError) -> DataError:
    """Returns the error of a record that stops the preparation, with the way to go on."""
    return DataError(f"{error} (`dataset.on_bad_record='skip'` leaves such records out)")


class _Fields:
    """Maps records under the rule for fields that nothing reads; see `xtuner.dataset.mapping.unread_fields`."""

    def __init__(self, ignore: frozenset[str], template: Template, summary: Summary) -> None:
        self._ignore, self._template, self._summary = ignore, template, summary

    def map(self, function: MapFn, record: Record) -> list[Conversation]:
        """`apply_map_fn`, with the fields that nothing reads reported."""
        own, name = is_own(function), function_name(function)
        ignored, notes = set[str](), list[str]()
        value = _cleaned(record, self._ignore, ignored, padding=not own, kept=getattr(function, 'columns', ()))
        observed = _observed(value, record.origin)
        found = apply_map_fn(function, record, observed)
        if found:
            check_columns(observed, found, name, own=own, note=notes.append)
        found = [self._checked(conversation, notes.append) for conversation in found]
        self._summary.add_ignored(ignored)
        self._summary.add_unused(dict.fromkeys(notes))
        return found

    def _checked(self, conversation: Conversation, note: Callable[[str], None]) -> Conversation:
        """Returns the conversation with those further fields of its messages that the template reads."""
        template, origin = self._template, conversation.origin
        if conversation.tools and not template.reads('tools'):
            raise unused(f'{origin}: template `{template.name}` has no place for `tools`',
                         from_tokenizer(template, 'write them into the system message'), 'tools')  # fmt: skip
        if not any(message.extra for message in conversation.messages):
            return conversation
        messages = [
            replace(message, extra=check_extras(message.extra, f'messages[{index}]', template, origin, note=note))
            for index, message in enumerate(conversation.messages)
        ]
        return replace(conversation, messages=tuple(messages))


def _cleaned(
    record: Record, ignore: frozenset[str], removed: set[str], *, padding: bool, kept: Collection[str] = ()
) -> Any:
    """The record's value without ignored fields and, where `padding`, without None.

    None stays in the columns `kept`, which the map function needs: an empty one is another fault than a missing one.
    """
    if not isinstance(record.value, Mapping) or not (ignore or padding):
        return record.value
    try:
        value = without(record.value, ignore, removed, padding=padding)
    except RecursionError:
        raise DataError(f'{record.origin}: is nested too deeply to be read') from None
    missing = [key for key in kept if key in record.value and key not in value and key not in ignore]
    return value | dict.fromkeys(missing) if missing else value


def visible_fields(record: Record, ignore: Collection[str]) -> Any:
    """The record's value as a detector sees it: without padding and without what is ignored."""
    return _cleaned(record, frozenset(ignore), set(), padding=True)


def _observed(value: Any, origin: str) -> Observed:
    if not isinstance(value, Mapping):
        raise DataError(f'{origin}: a record must be a dict, got {type(value).__name__}')
    return Observed(value)


def apply_map_fn(function: MapFn, record: Record, observed: Observed | None = None) -> list[Conversation]:
    """Returns the conversations that a map function makes of a record, checked; none where it leaves the record out.

    Args:
        function: The map function.
        record: The record.
        observed: What the function gets of it; None: all.

    Raises:
        DataError: Where the map function fails or returns something else; names the columns of the record.
    """
    observed = _observed(record.value, record.origin) if observed is None else observed
    try:
        found = function(observed)
        results = found if isinstance(found, list) else [found]
        return [to_conversation(result, record.origin) for result in results if not _is_left_out(result)]
    except DataError as error:
        where = f'{record.origin}: '
        raise DataError(f'{where}{str(error).removeprefix(where)}') from None
    except RecursionError:
        raise DataError(f'{record.origin}: is nested too deeply to be read') from None
    except Exception as error:  # the user's own function may raise anything
        raise DataError(_explain(function, record, error)) from None


def is_own(function: MapFn) -> bool:
    """Whether a map function is the user's."""
    return not str(getattr(function, '__module__', '')).startswith('xtuner.dataset.map_fns.')


def function_name(function: MapFn) -> str:
    """The name of a map function in messages."""
    return getattr(function, '__name__', None) or type(function).__name__


def _is_left_out(result: Any) -> bool:
    return result is None or (isinstance(result, Mapping) and result.get('conversation', True) in ([], ()))


def _explain(function: MapFn, record: Record, error: Exception) -> str:
    name = function_name(function)
    columns = ', '.join(sorted(map(str, record.value))) or 'none'
    needed = getattr(function, 'columns', None)
    missing = [column for column in needed or () if column not in record.value]
    if missing:
        return (f'{record.origin}: `{name}` needs the column{"s" if len(missing) > 1 else ""} {", ".join(missing)}; '
                f'found {columns}; {nearest_format(record.value)}')  # fmt: skip
    if isinstance(error, KeyError) and error.args and error.args[0] not in record.value:
        return (f'{record.origin}: `{name}` reads {error.args[0]!r}, which this record does not have; it has '
                f'{columns}; read what may be missing with `.get({error.args[0]!r})`')  # fmt: skip
    return (
        f'{record.origin}: `{name}` failed with {type(error).__name__}: {one_line(error)}; the record has the columns '
        f'{columns}'
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
