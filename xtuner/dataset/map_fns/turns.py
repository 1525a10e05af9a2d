"""The turn of a record of one question and one answer, with what stands before it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from xtuner.dataset.mapping.unread_fields import is_empty, kind_of
from xtuner.errors import DataError
from xtuner.utils.fields import shown


def one_turn(example: Mapping[str, Any], question: Any, answer: Any, *, system: str = '') -> dict[str, Any]:
    """Returns the conversation of a question and its answer, after the record's own system text, history and tools.

    Args:
        example: The record; its `system` (or `system_prompt`), `history` and `tools` are used where it has them.
        question: What is asked.
        answer: What is trained.
        system: The system text where the record has none.

    Raises:
        DataError: Where `history` is in no known form, or as `system_text` does.
    """
    found = {'system': system_text(example) or system, 'tools': example.get('tools')}
    if history := _history(example.get('history')):
        last = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
        return {'messages': history + last, **found}
    return {'conversation': [{'input': question, 'output': answer}], **found}


def system_text(example: Mapping[str, Any]) -> str:
    """Returns the system text of a record: its `system` or `system_prompt`; '' where it has neither.

    Raises:
        DataError: Where one of them is not text, or they differ.
    """
    found: list[str] = []
    for key in ('system', 'system_prompt'):
        if isinstance(value := example.get(key), str):
            found += [value] if value else []
        elif not is_empty(value):
            raise DataError(f'`{key}` must be text, got {type(value).__name__} {shown(value)}')
    if len(set(found)) > 1:
        raise DataError("`system` and `system_prompt` are different texts; leave one of them out with "
                        "dataset.ignore=['system_prompt'] or ['system']")  # fmt: skip
    return found[0] if found else ''


def join(question: Any, context: Any) -> Any:
    """Returns the question, and below it the text it is about, where there is one."""
    return f'{question}\n{context}' if isinstance(question, str) and context else question


def message(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a message of ShareGPT with its `from` and `value` as `role` and `content`; any other as it is."""
    if 'from' not in turn or 'value' not in turn:
        return turn
    others = {key: value for key, value in turn.items() if key not in ('from', 'value')}
    return {**others, 'role': turn['from'], 'content': turn['value']}


def learnt(fields: Mapping[str, Any], read: Collection[str]) -> dict[str, Any]:
    """Returns those further fields of a part of a record that would change what is learnt; the rest is its format's."""
    return {key: value for key, value in fields.items() if key not in read and kind_of(str(key))}


def _history(turns: Any) -> list[Any]:
    """Earlier turns as messages, from messages or from `[question, answer]` each; perhaps as JSON text."""
    if isinstance(turns, str) and turns.strip():
        try:
            turns = json.loads(turns)
        except ValueError:
            raise DataError(f'`history` is text that is not JSON: {turns[:60]!r}') from None
    if is_empty(turns):
        return []
    if isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns):
        return [message(turn) for turn in turns]
    if not isinstance(turns, list) or not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in turns):
        raise DataError(f'`history` must be a list of [question, answer] or of messages, got {str(turns)[:60]!r}')
    return [{'role': role, 'content': text}
            for turn in turns for role, text in zip(('user', 'assistant'), turn, strict=True)]  # fmt: skip
