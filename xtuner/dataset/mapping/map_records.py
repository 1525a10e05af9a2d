"""Maps records to conversations; every failure becomes an error message with file and line."""

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


def map_records(source: Source, config: DatasetConfig, summary: Summary, template: Template) -> Iterator[Conversation]:
    """Yields the conversations of a source; counts records, errors, unused and ignored fields in `summary`.

    Raises:
        DataError: For the first bad record, under `on_bad_record='error'`.
        ConfigError: The map function does not exist, or no format is detected.
    """
    chosen = source.map_fn or config.map_fn
    function = resolve_map_fn(chosen) if chosen is not None else None
    ids, fields = _UniqueIds(config.unique_id), _FieldRules(frozenset(config.ignore), template, summary)
    summary.notes += [note for note in source.notes if note not in summary.notes]
    for record in source.records():
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


def stopped_by(error: DataError) -> DataError:
    """Returns the error for a record that stops preparation, with the option that skips such records."""
    return DataError(f"{error} (`dataset.on_bad_record='skip'` skips such records)")


class _FieldRules:
    """Maps records and applies the rule for fields that nothing reads; see `xtuner.dataset.mapping.unread_fields`."""

    def __init__(self, ignore: frozenset[str], template: Template, summary: Summary) -> None:
        self._ignore, self._template, self._summary = ignore, template, summary

    def map(self, function: MapFn, record: Record) -> list[Conversation]:
        """Calls `apply_map_fn` and reports the fields that nothing reads."""
        user_function, name = is_user_function(function), function_name(function)
        ignored, notes = set[str](), list[str]()
        required = getattr(function, 'columns', ())
        value = _cleaned(record, self._ignore, ignored, padding=not user_function, kept=required)
        observed = _observed(value, record.origin)
        conversations = apply_map_fn(function, record, observed)
        if conversations:
            check_columns(observed, conversations, name, user_function=user_function, note=notes.append)
        conversations = [self._checked(conversation, notes.append) for conversation in conversations]
        self._summary.add_ignored(ignored)
        self._summary.add_unused(dict.fromkeys(notes))
        return conversations

    def _checked(self, conversation: Conversation, note: Callable[[str], None]) -> Conversation:
        """Returns the conversation with only those extra message fields that the template reads."""
        template, origin = self._template, conversation.origin
        if conversation.tools and not template.reads('tools'):
            raise unused(f'{origin}: template `{template.name}` does not support `tools`',
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
    """Returns the record's value without ignored fields and, if `padding`, without None values.

    The columns `kept`, which the map function requires, keep their None: empty and missing are different errors.
    """
    if not isinstance(record.value, Mapping) or not (ignore or padding):
        return record.value
    try:
        value = without(record.value, ignore, removed, padding=padding)
    except RecursionError:
        raise DataError(f'{record.origin}: the record is nested too deeply') from None
    missing = [key for key in kept if key in record.value and key not in value and key not in ignore]
    return value | dict.fromkeys(missing) if missing else value


def visible_fields(record: Record, ignore: Collection[str]) -> Any:
    """Returns the record's value as format detection sees it: without padding and ignored fields."""
    return _cleaned(record, frozenset(ignore), set(), padding=True)


def _observed(value: Any, origin: str) -> Observed:
    if not isinstance(value, Mapping):
        raise DataError(f'{origin}: a record must be a dict, got {type(value).__name__}')
    return Observed(value)


def apply_map_fn(function: MapFn, record: Record, observed: Observed | None = None) -> list[Conversation]:
    """Returns the validated conversations that a map function makes of a record; none if it skips the record.

    Args:
        function: The map function.
        record: The record.
        observed: What is passed to the function; None: the whole record.

    Raises:
        DataError: The map function fails or returns an invalid value; names the record's columns.
    """
    observed = _observed(record.value, record.origin) if observed is None else observed
    try:
        result = function(observed)
        results = result if isinstance(result, list) else [result]
        return [to_conversation(value, record.origin) for value in results if not _is_skipped(value)]
    except DataError as error:
        where = f'{record.origin}: '
        raise DataError(f'{where}{str(error).removeprefix(where)}') from None
    except RecursionError:
        raise DataError(f'{record.origin}: the record is nested too deeply') from None
    except Exception as error:  # the user's own function may raise anything
        raise DataError(_explain(function, record, error)) from None


def is_user_function(function: MapFn) -> bool:
    """Whether a map function is the user's own."""
    return not str(getattr(function, '__module__', '')).startswith('xtuner.dataset.map_fns.')


def function_name(function: MapFn) -> str:
    """Name of a map function for messages."""
    return getattr(function, '__name__', None) or type(function).__name__


def _is_skipped(result: Any) -> bool:
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
        return (f'{record.origin}: `{name}` reads {error.args[0]!r}, which this record lacks; it has '
                f'{columns}; read optional columns with `.get({error.args[0]!r})`')  # fmt: skip
    return (
        f'{record.origin}: `{name}` failed with {type(error).__name__}: {one_line(error)}; the record has the columns '
        f'{columns}'
    )


class _UniqueIds:
    """Values of the unique field seen so far, as hashes of 8 bytes."""

    def __init__(self, field: str | None) -> None:
        self._field = field
        self._seen: set[bytes] = set()

    def check(self, record: Record) -> None:
        """Raises DataError for a value that occurred before."""
        if self._field is None or not isinstance(record.value, Mapping):
            return
        value = record.value.get(self._field)
        if value is None or value == '':
            return
        key = hashlib.blake2b(repr(value).encode('utf-8', 'replace'), digest_size=8).digest()
        if key in self._seen:
            raise DataError(f'{record.origin}: `{self._field}` {str(value)[:60]!r} occurred before; set '
                            '`dataset.unique_id = None` if it need not be unique')  # fmt: skip
        self._seen.add(key)
