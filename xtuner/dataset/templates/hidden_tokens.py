"""Hides control tokens that a conversation contains as text from a chat template, and restores them in its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from xtuner.dataset.conversation import Message
from xtuner.errors import DataError

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class HiddenTokens:
    """Replaces control tokens in message texts by unused private characters while a template is rendered.

    Args:
        messages: The conversation's messages.
        tools: The conversation's tools.
        controls: The control tokens, longest first.
        meant: The control tokens that stay control tokens in what the model writes.
    """

    def __init__(
        self, messages: Sequence[Message], tools: Sequence[Any], controls: Sequence[str], meant: set[str]
    ) -> None:
        texts = ''.join(_texts([[message.content, message.extra] for message in messages] + [tools]))
        contained = [name for name in controls if name in texts]
        used = set(texts) if contained else ()
        free = (char for code in chain(*_PRIVATE_USE) if (char := chr(code)) not in used)
        self._placeholders = dict(zip(contained, free, strict=False))
        if len(self._placeholders) < len(contained):
            raise DataError('the conversation uses every private character of Unicode')
        self._in_answers = {name: char for name, char in self._placeholders.items() if name not in meant}

    def show(self, message: Message) -> dict[str, Any]:
        """Returns the message as the template sees it."""
        placeholders = self._in_answers if message.role == 'assistant' else self._placeholders
        return _replaced({**message.extra, 'role': message.role, 'content': message.content}, placeholders)

    def hide(self, value: Any) -> Any:
        """Replaces control tokens in any value that is not an answer."""
        return _replaced(value, self._placeholders)

    def restore(self, text: str) -> str:
        """Replaces the placeholders in rendered text by the control tokens."""
        for name, char in self._placeholders.items():
            text = text.replace(char, name)
        return text


def _replaced(value: Any, placeholders: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for name, char in placeholders.items():
            value = value.replace(name, char)
        return value
    if isinstance(value, Mapping):
        return {_replaced(key, placeholders): _replaced(item, placeholders) for key, item in value.items()}
    return [_replaced(item, placeholders) for item in value] if isinstance(value, (list, tuple)) else value


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = chain(*value.items()) if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [text for item in items for text in _texts(item)]
