"""Columns that the map function does not read: an error if one would change what is trained, otherwise a note.

Names alone are ambiguous (`loss` may be a perplexity, `tool` the name of a program), so the value decides as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from xtuner.dataset.conversation import Conversation, Message, to_conversation
from xtuner.dataset.map_fns.registration import TURNS
from xtuner.dataset.map_fns.turns import message
from xtuner.dataset.mapping.unread_fields import Observed, flag_of, is_empty, kind_of, trained_by, unused
from xtuner.errors import DataError
from xtuner.utils.fields import shown

# As plain text these label a record (`developer: "OpenAI"`, `tool: "chatgpt"`, `turns: "2"`), unless it is JSON.
_LABELS = frozenset({'developer', 'tool', 'turns'})
# Values that say whether or how much a model reasoned; they are not reasoning themselves.
_SETTINGS = frozenset(
    ['on', 'off', 'yes', 'no', 'true', 'false', '0', '1', 'enabled', 'disabled', 'auto', 'none', 'minimal', 'low',
     'medium', 'high']
)  # fmt: skip


def check_columns(
    record: Observed,
    conversations: Sequence[Conversation],
    function: str,
    *,
    user_function: bool,
    note: Callable[[str], None],
) -> None:
    """Reports the columns of a record that its map function did not read.

    Args:
        record: The record passed to the map function.
        conversations: The function's result, at least one conversation.
        function: The name of the map function.
        user_function: Whether the map function is the user's own, which may skip any column: notes only.
        note: Called with the name of each unused column.

    Raises:
        DataError: A column would change what is trained.
    """
    for key, value in zip(dict.keys(record), dict.values(record), strict=True):
        if key in record.read or is_empty(value):
            continue
        kind = '' if user_function else kind_of_column(str(key), value)
        if kind and not (kind == 'earlier turns' and _repeats(value, conversations)):
            what, remedy = _fault(str(key), value, kind, f'`{function}`', record)
            raise unused(f'{conversations[0].origin}: {what}', remedy, str(key))
        note(str(key))


def kind_of_column(name: str, value: Any) -> str:
    """Kind of training-relevant content in a column, by name and value, as in `kind_of`; '' for any other column."""
    kind = kind_of(name)
    if kind == 'training flag':
        flags = {flag_of(item) for item in _scalars(value)}
        return '' if None in flags or flags == {trained_by(name)} else kind
    if isinstance(value, (bool, int, float)):  # a count or a label
        return ''
    if kind == 'image, audio or video' and re.search('[iI][dD][sS]?$', name):
        return ''
    text = value.strip().lower() if isinstance(value, str) else None
    is_label = text is not None and name.lower() in _LABELS and not text.startswith(('[', '{'))
    return '' if is_label or (kind == 'reasoning' and text in _SETTINGS) else kind


def _scalars(value: Any) -> Iterator[Any]:
    """Yields the values of nested lists; the value itself if it is not a list."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, (list, tuple)):
            todo += item
        else:
            yield item


def _fault(name: str, value: Any, kind: str, function: str, record: Observed) -> tuple[str, str]:
    """Returns what is wrong with a column, and the remedy."""
    if kind == 'training flag':
        return (f'`{name}` is {shown(value)} (training flag), but {function} does not read it and would train all '
                'answers of the record', 'write `loss`: false into each message that is not to be trained, or remove '
                'the record if none is')  # fmt: skip
    used = [turns for turns in TURNS if turns in record.read and not is_empty(dict.get(record, turns))]
    if kind == 'earlier turns' and used:
        return (f'`{name}` (earlier turns) is not read by {function}, which uses the different `{used[0]}`',
                f'to use {name} instead, set dataset.ignore=[{used[0]!r}]')  # fmt: skip
    return f'`{name}` ({kind}) is not read by {function}', 'name a map function that uses it with `dataset.map_fn`'


def _repeats(turns: Any, conversations: Sequence[Conversation]) -> bool:
    """Whether a column repeats the messages of the only conversation, possibly without its system text."""
    if len(conversations) > 1 or not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return False
    form = {'conversation': turns} if 'output' in turns[0] else {'messages': list(map(message, turns))}
    try:
        others = list(map(_training_content, to_conversation(form).messages))
    except DataError:
        return False
    used = list(map(_training_content, conversations[0].messages))
    return others == used or (conversations[0].messages[0].role == 'system' and others == used[1:])


def _training_content(message: Message) -> tuple[Any, ...]:
    """The parts of a message that change what is trained."""
    return message.role, message.content, message.loss, {k: v for k, v in message.extra.items() if kind_of(k)}
