"""What is refused, and that nothing a client sends or leaves out stops the service."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from http.client import HTTPConnection
from typing import Any

import openai
import pytest

from tests.serve.conftest import Running, serving
from xtuner.inference.generate import Sampling

JSON = {'Content-Type': 'application/json'}


def post(running: Running, body: Any, path: str = '/v1/chat/completions', **headers: str) -> tuple[int, dict[str, Any]]:
    """Sends bytes, or a body as JSON; returns the status and the error."""
    connection = HTTPConnection('127.0.0.1', running.port, timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request('POST', path, data, JSON | {k.replace('_', '-'): v for k, v in headers.items()})
    response = connection.getresponse()
    return response.status, json.loads(response.read()).get('error', {})


def chat(running: Running, **fields: Any) -> dict[str, Any]:
    return {'model': running.base, 'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 2} | fields


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


def test_the_wrong_address_method_model_and_form(server: Running) -> None:
    assert post(server, {}, '/v1/embeddings')[0] == 404
    status, error = post(server, chat(server, model='gpt-4'))
    assert (status, error['code'], error['param']) == (404, 'model_not_found', 'model')
    connection = HTTPConnection('127.0.0.1', server.port)
    connection.request('GET', '/v1/chat/completions')
    response = connection.getresponse()
    assert (response.status, response.headers['Allow']) == (405, 'POST')
    assert 'GET is not allowed' in json.loads(response.read())['error']['message']
    assert post(server, chat(server), Content_Type='text/plain')[0] == 415, 'a web page could send that'
    assert post(server, chat(server), Host='evil.example')[0] == 403, 'a web page could send that'


def test_a_body_too_large_is_refused_before_it_is_read(server: Running) -> None:
    ten_megabytes = b'{"model": "' + b'x' * 10_000_000
    status, error = post(server, ten_megabytes)
    assert (status, error['code']) == (413, 'request_too_large')
    with socket.create_connection(('127.0.0.1', server.port), timeout=10) as raw:  # announced, never sent
        raw.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                    b'Content-Length: 10000000\r\n\r\n')  # fmt: skip
        assert b' 413 ' in raw.recv(1000)
    with socket.create_connection(('127.0.0.1', server.port), timeout=10) as raw:  # and nothing is to follow
        raw.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                    b'Connection: close\r\nContent-Length: 10000000\r\n\r\n' + b'x' * 10_000_000)  # fmt: skip
        assert b' 413 ' in raw.recv(1000), 'reset before the client saw why'
    connection = HTTPConnection('127.0.0.1', server.port, timeout=10)  # not announced
    connection.request('POST', '/v1/completions', iter([b'x' * 500_000] * 20), JSON, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_slow_clients_are_shown_the_door(loaded: Any) -> None:
    """Headers byte by byte, a second request that never comes whole, a body that stops; others are served meanwhile."""
    with serving(loaded, header_s=0.5, body_s=0.5) as running:
        slow = socket.create_connection(('127.0.0.1', running.port), timeout=10)
        idle = socket.create_connection(('127.0.0.1', running.port), timeout=10)
        stuck = socket.create_connection(('127.0.0.1', running.port), timeout=10)
        stuck.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                      b'Content-Length: 50\r\n\r\n{"model"')  # fmt: skip
        second = socket.create_connection(('127.0.0.1', running.port), timeout=10)
        second.sendall(b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n')
        assert b'200' in second.recv(1000)
        began, sent = time.monotonic(), 0
        with pytest.raises(OSError):
            while time.monotonic() < began + 5:
                slow.sendall(b'GET /health HTTP/1.1\r\n'[sent : sent + 1] or b'x')
                second.sendall(b'x')
                sent += 1
                time.sleep(0.05)
        assert post(running, chat(running))[0] == 200
        assert time.monotonic() < began + 3
        assert b' 408 ' in stuck.recv(1000)
        for gone in (slow, idle, second):
            with gone, contextlib.suppress(ConnectionResetError):
                while gone.recv(1000):
                    pass
        stuck.close()


def test_a_full_queue_says_so_and_when_to_come_again(loaded: Any, endless: Any) -> None:
    with serving(loaded, decoder=endless, max_length=2048, waiting=2) as running:
        client = running.client()
        held = [client.chat.completions.create(**chat(running, max_tokens=2000, stream=True)) for _ in range(3)]
        for stream in held:
            assert [next(stream) for _ in range(2)][1].choices[0].delta.content
        waiting = [threading.Thread(target=post, args=(running, chat(running))) for _ in range(2)]
        for thread in waiting:
            thread.start()
        until = time.monotonic() + 5
        while running.service.scheduler.num_waiting < 2 and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match='2 answers are waiting, the maximum is 2') as full:
            client.chat.completions.create(**chat(running))
        assert full.value.response.headers['Retry-After'] == '1'
        two = {'model': running.base, 'prompt': ['a', 'b']}
        assert post(running, two, '/v1/completions')[0] == 429, 'all or none'
        for stream in held:
            stream.close()
        for thread in waiting:
            thread.join(10)
        assert post(running, chat(running))[0] == 200
        running.wait_until_idle()


def test_an_api_key(loaded: Any, caplog: pytest.LogCaptureFixture) -> None:
    with serving(loaded, api_key='sesame-123', hosts=None) as running, caplog.at_level(logging.DEBUG):
        good = running.client(api_key='sesame-123')
        assert good.chat.completions.create(**chat(running)).choices
        assert len(list(good.models.list())) == 3
        for key in ('none', 'sesame-12', 'sesame-1234', 'é'):
            status, error = post(running, chat(running), Authorization=f'Bearer {key}')
            assert (status, error['code']) == (401, 'invalid_api_key')
            assert key not in error['message']
        assert post(running, chat(running))[0] == 401
        assert post(running, chat(running), Authorization='Basic sesame-123')[0] == 401
        assert post(running, b'x' * 2_000_000)[0] == 401, 'before the body is read'
        assert post(running, chat(running), Host='served.example', Authorization='Bearer sesame-123')[0] == 200
        connection = HTTPConnection('127.0.0.1', running.port)
        connection.request('GET', '/health')
        assert connection.getresponse().status == 200
    assert 'sesame' not in caplog.text


def test_nothing_that_is_asked_or_answered_is_logged(loaded: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger('xtuner').propagate = True
    with serving(loaded) as running, caplog.at_level(logging.DEBUG):
        secret: Any = [{'role': 'user', 'content': 'PRIVATE'}]
        answer = running.client().chat.completions.create(**chat(running, messages=secret, max_tokens=16))
        post(running, chat(running, messages=[{'role': 'PRIVATE'}]))
        post(running, b'{"model": "tiny", "PRIVATE"')
        post(running, chat(running, model='PRIVATE'))
    assert 'chat 200' in caplog.text
    assert 'PRIVATE' not in caplog.text
    assert answer.choices[0].message.content not in caplog.text


def test_a_character_of_several_tokens_comes_whole(loaded: Any, endless: Any) -> None:
    """The model is made to say a text whose characters are spelled byte by byte."""
    text = 'Ça va? 你好 🙂 é'
    tokenizer = loaded.served[0].tokenizer
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    assert len(ids) > len(text), 'no character of several tokens'
    said = iter(ids)

    def say(self: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        time.sleep(0.005)
        logits = torch.zeros(1, len(tokenizer))
        logits[0, next(said)] = 1
        return logits

    type(endless).prefill, type(endless).step = say, say
    with serving(loaded, decoder=endless, sampling=Sampling(64, 0)) as running:
        stream = running.client().chat.completions.create(**chat(running, max_tokens=len(ids), stream=True))
        pieces = [chunk.choices[0].delta.content or '' for chunk in stream]
    assert ''.join(pieces) == text
    assert '\ufffd' not in ''.join(pieces)
    assert len([piece for piece in pieces if piece]) > 3, 'it came in one piece'


@pytest.mark.parametrize('left_out', [1, 2, 3])
def test_a_character_that_is_cut_is_left_out(loaded: Any, endless: Any, left_out: int) -> None:
    """`max_tokens` ends the answer inside a character: nothing of it goes out, whole or as a stream."""
    import torch

    tokenizer = loaded.served[0].tokenizer
    ids = tokenizer('Hi 🙂', add_special_tokens=False)['input_ids']
    said = iter([*ids[:-left_out], *ids[:-left_out]])

    def say(*args: Any, **kwargs: Any) -> Any:
        logits = torch.zeros(1, len(tokenizer))
        logits[0, next(said)] = 1
        return logits

    endless.prefill = endless.step = say
    with serving(loaded, decoder=endless, sampling=Sampling(64, 0)) as running:
        asked: Any = chat(running, max_tokens=len(ids) - left_out)
        whole = running.client().chat.completions.create(**asked)
        stream = running.client().chat.completions.create(**asked, stream=True)
        assert ''.join(chunk.choices[0].delta.content or '' for chunk in stream) == 'Hi '
        assert whole.choices[0].message.content == 'Hi '
        assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ('length', len(ids) - left_out)
