"""What a client reads when its answer ends in an error."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest
import torch

from tests.serve.conftest import Running, serving


def health(running: Running) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f'{running.url}/health', timeout=5) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def chat(running: Running, text: str = 'Hi', **options: Any) -> Any:
    messages: Any = [{'role': 'user', 'content': text}]
    return running.client(timeout=20).chat.completions.create(model=running.base, messages=messages,
                                                              **{'max_tokens': 4} | options)  # fmt: skip


def test_a_dead_thread_is_told_and_nobody_waits_for_it(loaded: Any) -> None:
    with serving(loaded) as running:
        running.service.scheduler.stop()
        status, body = health(running)
        assert (status, body['status']) == (503, 'failing') and 'ended' in body['error']
        with pytest.raises(openai.InternalServerError, match='restarted'):
            chat(running)


def test_each_client_reads_why_its_answer_ended(loaded: Any, endless: Any) -> None:
    with serving(loaded, decoder=endless, max_length=2048) as running:
        stream = chat(running, stream=True, max_tokens=2000)
        assert next(stream) and next(stream)
        step = endless.step
        endless.step = lambda *args, **kwargs: torch.full_like(step(*args, **kwargs), float('nan'))
        with pytest.raises(openai.APIError, match='NaN'):
            list(stream)
        with pytest.raises(openai.InternalServerError, match='restarted'):
            chat(running, max_tokens=30)
        assert health(running)[0] == 503
        endless.step = step
        assert chat(running).choices[0].message.content is not None
        assert health(running)[0] == 200
