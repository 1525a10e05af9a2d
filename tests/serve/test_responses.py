"""Events that are written around their text are those that are written whole."""

from __future__ import annotations

import pytest

from xtuner.serve.responses import Choice, Pieces, ResponseBuilder, event

pytestmark = pytest.mark.unit


@pytest.mark.parametrize('usage', [False, True])
@pytest.mark.parametrize('chat', [False, True])
def test_a_piece_is_the_event_of_its_chunk(chat: bool, usage: bool) -> None:
    head = ResponseBuilder(chat, 'id', 7, 'a model named "\0"', 3, with_usage=usage, choices=[Choice(), Choice()])
    write = Pieces(head, 1)
    for text in ('a', '"\\\n\0', '春'):
        assert [write(text, None)] == [event(chunk) for chunk in head.chunk(1, text, None)]
        assert write(text, 'stop') == b''.join(event(chunk) for chunk in head.chunk(1, text, 'stop'))
