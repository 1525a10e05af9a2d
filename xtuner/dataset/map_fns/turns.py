"""Helpers for map functions: a question and its answer with system text, history and tools."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from xtuner.dataset.mapping.unread_fields import is_empty, kind_of
from xtuner.errors import DataError
from xtuner.utils.fields import shown


def one_turn(example: Mapping[str, Any], question: Any, answer: Any, *, system: str = '') -> dict[str, Any]:
    """Returns the conversation of a question and its answer, after the record's system text, history and tools.

    Args:
        example: The record; its `system` (or `system_prompt`), `history` and `tools` are used if present.
        question: The user's text.
        answer: The assistant's text, which is trained.
        system: The system text if the record has none.

    Raises:
        DataError: `history` has an unknown form, or as `system_text` raises.
    """
    context = {'system': system_text(example) or system, 'tools': example.get('tools')}
    if history := _history(example.get('history')):
        last = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
        return {'messages': history + last, **context}
    return {'conversation': [{'input': question, 'output': answer}], **context}


def system_text(example: Mapping[str, Any]) -> str:
    """Returns a record's `system` or `system_prompt`; '' if it has neither.

    Raises:
        DataError: One of them is not text, or they differ.
    """
    texts: list[str] = []
    for key in ('system', 'system_prompt'):
        if isinstance(value := example.get(key), str):
            texts += [value] if value else []
        elif not is_empty(value):
            raise DataError(f'`{key}` must be text, got {type(value).__name__} {shown(value)}')
    if len(set(texts)) > 1:
        raise DataError("`system` and `system_prompt` differ; ignore one of them with "
                        "dataset.ignore=['system_prompt'] or ['system']")  # fmt: skip
    return texts[0] if texts else ''


def join(question: Any, context: Any) -> Any:
    """Returns the question followed by the text that it is about, if any."""
    return f'{question}\n{context}' if isinstance(question, str) and context else question


def message(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a ShareGPT message with `from` and `value` renamed to `role` and `content`; any other unchanged."""
    if 'from' not in turn or 'value' not in turn:
        return turn
    others = {key: value for key, value in turn.items() if key not in ('from', 'value')}
    return {**others, 'role': turn['from'], 'content': turn['value']}


def training_fields(fields: Mapping[str, Any], read: Collection[str]) -> dict[str, Any]:
    """Returns the unread fields that would change what is trained; the others only belong to the format."""
    return {key: value for key, value in fields.items() if key not in read and kind_of(str(key))}


def _history(turns: Any) -> list[Any]:
    """Returns earlier turns as messages, from messages or `[question, answer]` pairs, possibly as JSON text."""
    if isinstance(turns, str) and turns.strip():
        try:
            turns = json.loads(turns)
        except ValueError:
            raise DataError(f'`history` is not valid JSON: {turns[:60]!r}') from None
    if is_empty(turns):
        return []
    if isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns):
        return [message(turn) for turn in turns]
    if not isinstance(turns, list) or not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in turns):
        raise DataError(f'`history` must be a list of [question, answer] or of messages, got {str(turns)[:60]!r}')
    return [{'role': role, 'content': text}
            for turn in turns for role, text in zip(('user', 'assistant'), turn, strict=True)]  # fmt: skip
