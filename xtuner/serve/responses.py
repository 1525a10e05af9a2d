"""Builds the responses of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response


@dataclass
class Choice:
    """One answer, as far as it has been generated."""

    text: str = ''
    num_tokens: int = 0
    finish: str | None = None


@dataclass(frozen=True)
class ResponseBuilder:
    """Builds the JSON of a response or of its stream.

    Attributes:
        chat: Whether this is a chat completion.
        id: Id of the response.
        created: Unix time in seconds.
        model: Name of the model.
        num_prompt_tokens: Tokens of all prompts together.
        with_usage: Whether a stream ends with token counts.
    """

    chat: bool
    id: str
    created: int
    model: str
    num_prompt_tokens: int
    with_usage: bool = False
    choices: list[Choice] = field(default_factory=list)

    def whole(self) -> dict[str, Any]:
        """The complete response of a request without `stream`."""
        return self._object(
            'chat.completion' if self.chat else 'text_completion',
            [self._choice(n, c.text, c.finish, 'message') for n, c in enumerate(self.choices)],
            usage=self.usage(),
        )

    def first_chunks(self) -> list[dict[str, Any]]:
        """The first chunks of a stream, with the role."""
        if not self.chat:
            return []
        return [self._chunk(n, {'role': 'assistant', 'content': ''}, None) for n in range(len(self.choices))]

    def chunk(self, number: int, text: str, finish: str | None) -> list[dict[str, Any]]:
        """The chunks for a piece of an answer; the end is a separate chunk, as in OpenAI's API."""
        if not self.chat:
            return [self._chunk(number, text, finish)]
        chunks = [self._chunk(number, {'content': text}, None)] if text else []
        return chunks + ([self._chunk(number, {}, finish)] if finish else [])

    def last_chunks(self) -> list[dict[str, Any]]:
        """The last chunks of a stream, with the token counts if requested."""
        return [self._object(self._chunk_kind, [], usage=self.usage())] if self.with_usage else []

    def usage(self) -> dict[str, int]:
        """The token counts; stop tokens are included."""
        generated = sum(choice.num_tokens for choice in self.choices)
        prompt = self.num_prompt_tokens
        return {'prompt_tokens': prompt, 'completion_tokens': generated, 'total_tokens': prompt + generated}

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
    """Encodes the events of one streamed answer; their constant parts are encoded only once.

    Args:
        head: Builds the response.
        number: Index of the answer.
    """

    def __init__(self, head: ResponseBuilder, number: int) -> None:
        self._head, self._number = head, number
        (chunk,) = head.chunk(number, _MARK, None)
        self._before, _, self._after = event(chunk).rpartition(to_json(_MARK))

    def __call__(self, text: str, finish: str | None) -> bytes:
        """The events for a piece of text."""
        if finish is None:
            return self._before + to_json(text) + self._after
        return b''.join(map(event, self._head.chunk(self._number, text, finish)))


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b'data: ' + to_json(content) + b'\n\n'


DONE = b'data: [DONE]\n\n'
_MARK = '\0'  # placeholder for the text; it comes after all client-controlled values
_encode = json.JSONEncoder(ensure_ascii=False, separators=(',', ':')).encode


def to_json(content: Any) -> bytes:
    """Compact JSON in UTF-8; an unpaired surrogate, which a client's JSON may contain, becomes a question mark."""
    return _encode(content).encode('utf-8', 'replace')


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(to_json(content), status, headers, media_type='application/json')
