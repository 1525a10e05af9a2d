"""Hides the control tokens that a conversation spells from a chat template, and puts them back into what it wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from xtuner.dataset.conversation import Message
from xtuner.errors import DataError

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class HiddenTokens:
    """Stands characters that occur nowhere in a conversation for the control tokens that its messages spell.

    Args:
        messages: The conversation's.
        tools: What is on offer in it.
        controls: The control tokens, the longest first.
        meant: Those that mean themselves in what the model writes.
    """

    def __init__(
        self, messages: Sequence[Message], tools: Sequence[Any], controls: Sequence[str], meant: set[str]
    ) -> None:
        texts = ''.join(_texts([[message.content, message.extra] for message in messages] + [tools]))
        spelt = [name for name in controls if name in texts]
        used = set(texts) if spelt else ()
        free = (char for code in chain(*_PRIVATE_USE) if (char := chr(code)) not in used)
        self._stands = dict(zip(spelt, free, strict=False))
        if len(self._stands) < len(spelt):
            raise DataError('the conversation uses every private character that Unicode has')
        self._in_answers = {name: char for name, char in self._stands.items() if name not in meant}

    def show(self, message: Message) -> dict[str, Any]:
        """Returns the message as the template sees it."""
        stands = self._in_answers if message.role == 'assistant' else self._stands
        return _replaced({**message.extra, 'role': message.role, 'content': message.content}, stands)

    def hide(self, value: Any) -> Any:
        """Returns what is no answer as the template sees it."""
        return _replaced(value, self._stands)

    def back(self, text: str) -> str:
        """Puts what was hidden back."""
        for name, char in self._stands.items():
            text = text.replace(char, name)
        return text


def _replaced(value: Any, stands: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for name, char in stands.items():
            value = value.replace(name, char)
        return value
    if isinstance(value, Mapping):
        return {_replaced(key, stands): _replaced(item, stands) for key, item in value.items()}
    return [_replaced(item, stands) for item in value] if isinstance(value, (list, tuple)) else value


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = chain(*value.items()) if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [text for item in items for text in _texts(item)]
