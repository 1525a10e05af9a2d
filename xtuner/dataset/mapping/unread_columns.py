"""Columns of a record that its map function does not read: an error where one would change what is learnt, else a note.

A name alone does not tell: `loss` may hold a perplexity, `tool` the name of a program. So the value decides as well.
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

# As text these label a record: `developer: "OpenAI"`, `tool: "chatgpt"`, `turns: "2"`; unless it is JSON.
_LABELS = frozenset({'developer', 'tool', 'turns'})
# What says whether a model reasoned, or how much, and is no reasoning.
_SETTINGS = frozenset(
    ['on', 'off', 'yes', 'no', 'true', 'false', '0', '1', 'enabled', 'disabled', 'auto', 'none', 'minimal', 'low',
     'medium', 'high']
)  # fmt: skip


def check_columns(
    record: Observed,
    found: Sequence[Conversation],
    function: str,
    *,
    own: bool,
    note: Callable[[str], None],
) -> None:
    """Reports the columns of a record that its map function did not read.

    Args:
        record: What the map function was given.
        found: What it made of it, at least one conversation.
        function: The name of the map function.
        own: Whether the map function is the user's, who may leave out what he likes: notes only.
        note: Called with the name of each unused column.

    Raises:
        DataError: For a column that would change what is learnt.
    """
    for key, value in zip(dict.keys(record), dict.values(record), strict=True):
        if key in record.read or is_empty(value):
            continue
        kind = '' if own else kind_of_column(str(key), value)
        if kind and not (kind == 'earlier turns' and _repeats(value, found)):
            what, way = _fault(str(key), value, kind, f'`{function}`', record)
            raise unused(f'{found[0].origin}: {what}', way, str(key))
        note(str(key))


def kind_of_column(name: str, value: Any) -> str:
    """What a column says that changes what is learnt, by its name and its value, as `kind_of`; '' for any other."""
    kind = kind_of(name)
    if kind == 'training flag':
        flags = {flag_of(item) for item in _scalars(value)}
        return '' if None in flags or flags == {trained_by(name)} else kind
    if isinstance(value, (bool, int, float)):  # counts or labels something
        return ''
    if kind == 'image, audio or video' and re.search('[iI][dD][sS]?$', name):
        return ''
    text = value.strip().lower() if isinstance(value, str) else None
    is_label = text is not None and name.lower() in _LABELS and not text.startswith(('[', '{'))
    return '' if is_label or (kind == 'reasoning' and text in _SETTINGS) else kind


def _scalars(value: Any) -> Iterator[Any]:
    """The values in lists within each other; a value that is no list itself."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, (list, tuple)):
            todo += item
        else:
            yield item


def _fault(name: str, value: Any, kind: str, function: str, record: Observed) -> tuple[str, str]:
    """What is wrong with a column, and what to do about it."""
    if kind == 'training flag':
        return (f'`{name}` is {shown(value)} (training flag), but {function} does not read it and trains all answers '
                'of the record', 'write `loss`: false into each message that is not to be trained, or remove the '
                'record where none is')  # fmt: skip
    used = [turns for turns in TURNS if turns in record.read and not is_empty(dict.get(record, turns))]
    if kind == 'earlier turns' and used:
        return (f'`{name}` (earlier turns) is not read by {function}, which uses `{used[0]}`, and the two differ',
                f'use {name} instead with dataset.ignore=[{used[0]!r}]')  # fmt: skip
    return f'`{name}` ({kind}) is not read by {function}', 'name a map function that uses it with `dataset.map_fn`'


def _repeats(turns: Any, found: Sequence[Conversation]) -> bool:
    """Whether a column holds the messages of the only conversation, perhaps without its system text."""
    if len(found) > 1 or not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return False
    form = {'conversation': turns} if 'output' in turns[0] else {'messages': list(map(message, turns))}
    try:
        others = list(map(_meaning, to_conversation(form).messages))
    except DataError:
        return False
    used = list(map(_meaning, found[0].messages))
    return others == used or (found[0].messages[0].role == 'system' and others == used[1:])


def _meaning(message: Message) -> tuple[Any, ...]:
    """What of a message changes what is learnt."""
    return message.role, message.content, message.loss, {k: v for k, v in message.extra.items() if kind_of(k)}
