"""Requests: bodies and fields that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.conftest import Running
from tests.serve.test_guard import chat, post


@pytest.mark.parametrize(
    ('body', 'message'),
    [
        (b'', 'not valid JSON'),
        (b'{"model": ', 'not valid JSON'),
        (b'\xff\xfe', 'not valid JSON'),
        (b'[' * 100_000, 'not valid JSON'),
        (b'1' * 10_000, 'not valid JSON'),
        (b'[1]', 'must be a JSON object, not a list'),
        (b'{}', '`messages` must be a list'),
        (b'{"messages": []}', 'at least one message, not an empty list'),
    ],
)
def test_a_malformed_body_is_said_to_be_one(server: Running, body: bytes, message: str) -> None:
    status, error = post(server, body)
    assert (status, error['type']) == (400, 'invalid_request_error')
    assert message in error['message']


@pytest.mark.parametrize(
    ('fields', 'param', 'code'),
    [
        ({'temperature': 3}, 'temperature', None),
        ({'temperature': 'hot'}, 'temperature', None),
        ({'temperature': float('nan')}, 'temperature', None),
        ({'top_p': -1}, 'top_p', None),
        ({'max_tokens': 0}, 'max_tokens', None),
        ({'max_tokens': True}, 'max_tokens', None),
        ({'max_completion_tokens': 1.5}, 'max_completion_tokens', None),
        ({'seed': 'x'}, 'seed', None),
        ({'stop': ''}, 'stop', None),
        ({'stop': ['a'] * 5}, 'stop', None),
        ({'stream': 'yes'}, 'stream', None),
        ({'stream_options': {'include_usage': 1}}, 'include_usage', None),
        ({'n': 2}, 'n', 'unsupported_parameter'),
        ({'logprobs': True}, 'logprobs', 'unsupported_parameter'),
        ({'tools': [{}]}, 'tools', 'unsupported_parameter'),
        ({'temprature': 0}, 'temprature', 'unknown_parameter'),
        ({'model': None}, 'model', None),
        ({'messages': []}, 'messages', None),
        ({'messages': ['Hi']}, 'messages[0].role', None),
        ({'messages': [{'role': 'user'}]}, 'messages[0].content', None),
        ({'messages': [{'role': 'king', 'content': 'Hi'}]}, 'messages[0].role', None),
        ({'messages': [{'role': 'user', 'content': 7}]}, 'messages', None),
        ({'messages': [{'role': 'user', 'content': '\ud800'}]}, 'messages', None),
        ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 'messages', None),
        ({'messages': [{'role': 'assistant', 'content': 'Hi'}]}, 'messages', None),
        ({'max_tokens': 10**9}, 'messages', 'context_length_exceeded'),
        ({'messages': [{'role': 'user', 'content': 'word ' * 2000}]}, 'messages', 'context_length_exceeded'),
    ],
)
def test_a_wrong_field_is_named(server: Running, fields: dict[str, Any], param: str, code: str | None) -> None:
    status, error = post(server, chat(server, **fields))
    assert (status, error['param'], error['code']) == (400, param, code)


def test_wrong_prompts_of_completions(server: Running) -> None:
    for prompt in (None, [], [[]], 7, [7.5], ['a', 7], ['a'] * 65, [10**6], [-1], '', ['a', ''], '\ud800'):
        status, error = post(server, {'model': server.base, 'prompt': prompt}, '/v1/completions')
        assert (status, error['param']) == (400, 'prompt'), prompt


def test_fields_without_effect_are_taken(server: Running) -> None:
    fields = {'n': 1, 'user': 'me', 'frequency_penalty': 0.0, 'logit_bias': None, 'response_format': {'type': 'text'},
              'tools': [], 'metadata': {'a': 'b'}, 'stop': None}  # fmt: skip
    assert post(server, chat(server, **fields))[0] == 200
