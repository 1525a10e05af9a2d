"""Rendering and encoding a request."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from tests.serve.conftest import serving
from tests.serve.test_problems import chat, health
from xtuner.errors import XTunerError
from xtuner.serve import encoding as encoding_module


def test_a_rendering_over_its_bounds_fails_its_request_alone(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it takes its time, a stream goes on and /health answers; one that is stuck is told there."""
    from xtuner.serve.models import ServedModel

    class OverBounds(XTunerError):
        pass

    render, going_on = ServedModel.render_chat, threading.Event()

    def slow(self: ServedModel, messages: Sequence[dict[str, Any]]) -> list[Any]:
        if messages[-1]['content'] == 'loop':
            assert going_on.wait(10)
            raise OverBounds('the chat template took more than 2 s')
        return render(self, messages)

    monkeypatch.setattr(ServedModel, 'render_chat', slow)
    monkeypatch.setattr(encoding_module, 'STUCK_S', 0.2)
    with serving(loaded) as running:
        stream = chat(running, stream=True, max_tokens=300)
        assert next(stream)
        failed: list[Exception] = []

        def ask() -> None:
            try:
                chat(running, 'loop')
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        assert len(list(stream)) > 1, 'it goes on meanwhile'
        until = time.monotonic() + 5
        while health(running)[0] == 200 and time.monotonic() < until:
            time.sleep(0.02)
        assert 'encoding' in health(running)[1]['error']
        going_on.set()
        thread.join(10)
        (error,) = failed
        assert isinstance(error, openai.BadRequestError) and 'more than 2 s' in str(error)
        assert health(running)[0] == 200
        assert chat(running).choices
