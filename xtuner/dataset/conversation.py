"""A conversation: what every map function yields and every template renders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: 'system', 'user', 'assistant' or 'tool'.
        content: The text, as the user wrote it; never parsed for control tokens.
        loss: Whether an assistant message is trained; None leaves it to `dataset.train_on`.
    """

    role: str
    content: str
    loss: bool | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages in order, with `origin` ('file:line' or 'dataset[row]') for error messages."""

    messages: tuple[Message, ...]
    origin: str = ''
