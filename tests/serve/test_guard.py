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
