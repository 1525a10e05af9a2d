"""OpenAI's responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response


@dataclass
class Choice:
    """One answer as far as it has come."""

    text: str = ''
    num_tokens: int = 0
    finish: str | None = None


@dataclass(frozen=True)
class ResponseBuilder:
    """What all parts of a response have in common.

    Attributes:
        chat: Whether it answers a conversation.
        id: Of the response.
        created: Unix time in seconds.
        model: The model that answers.
        num_prompt_tokens: Of all prompts together.
        with_usage: Whether a stream ends with the counts.
    """

    chat: bool
    id: str
    created: int
    model: str
    num_prompt_tokens: int
    with_usage: bool = False
    choices: list[Choice] = field(default_factory=list)

    def whole(self) -> dict[str, Any]:
        """The response that is no stream."""
        return self._object(
            'chat.completion' if self.chat else 'text_completion',
            [self._choice(n, c.text, c.finish, 'message') for n, c in enumerate(self.choices)],
            usage=self.usage(),
        )

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream begins with: who speaks."""
        if not self.chat:
            return []
        return [self._chunk(n, {'role': 'assistant', 'content': ''}, None) for n in range(len(self.choices))]

    def chunk(self, number: int, text: str, finish: str | None) -> list[dict[str, Any]]:
        """What a piece of an answer adds to a stream; its end is a chunk of its own, as OpenAI's is."""
        if not self.chat:
            return [self._chunk(number, text, finish)]
        found = [self._chunk(number, {'content': text}, None)] if text else []
        return found + ([self._chunk(number, {}, finish)] if finish else [])

    def last_chunks(self) -> list[dict[str, Any]]:
        """What a stream ends with."""
        return [self._object(self._chunk_kind, [], usage=self.usage())] if self.with_usage else []

    def usage(self) -> dict[str, int]:
        """The counts; a stop token counts as drawn."""
        drawn = sum(choice.num_tokens for choice in self.choices)
        read = self.num_prompt_tokens
        return {'prompt_tokens': read, 'completion_tokens': drawn, 'total_tokens': read + drawn}

    @property
    def _chunk_kind(self) -> str:
        return 'chat.completion.chunk' if self.chat else 'text_completion'

    def _chunk(self, number: int, content: Any, finish: str | None) -> dict[str, Any]:
        extra: dict[str, Any] = {'usage': None} if self.with_usage else {}
        return self._object(self._chunk_kind, [self._choice(number, content, finish, 'delta')], **extra)

    def _choice(self, number: int, content: Any, finish: str | None, name: str) -> dict[str, Any]:
        if name == 'message' and self.chat:
            content = {'role': 'assistant', 'content': content}
        return {'index': number, name if self.chat else 'text': content, 'logprobs': None, 'finish_reason': finish}

    def _object(self, kind: str, choices: Sequence[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        return {'id': self.id, 'object': kind, 'created': self.created, 'model': self.model, 'choices': choices} | extra


class Pieces:
    """The events by which one answer's text goes out; what they have in common is written once.

    Args:
        head: Of the response.
        number: Which of its answers.
    """

    def __init__(self, head: ResponseBuilder, number: int) -> None:
        self._head, self._number = head, number
        (chunk,) = head.chunk(number, _MARK, None)
        self._before, _, self._after = event(chunk).rpartition(to_json(_MARK))

    def __call__(self, text: str, finish: str | None) -> bytes:
        """What a piece adds to the stream."""
        if finish is None:
            return self._before + to_json(text) + self._after
        return b''.join(map(event, self._head.chunk(self._number, text, finish)))


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b'data: ' + to_json(content) + b'\n\n'


DONE = b'data: [DONE]\n\n'
_MARK = '\0'  # stands where the text goes, behind everything that a client has a say in
_encode = json.JSONEncoder(ensure_ascii=False, separators=(',', ':')).encode


def to_json(content: Any) -> bytes:
    """Compact JSON in UTF-8; half a surrogate pair, as a client's JSON may hold, becomes a question mark."""
    return _encode(content).encode('utf-8', 'replace')


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response of that."""
    return Response(to_json(content), status, headers, media_type='application/json')
