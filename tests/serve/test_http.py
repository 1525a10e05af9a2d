"""HTTP itself: where a request ends, addresses with a slash, versions of the protocol, what is no HTTP at all."""

from __future__ import annotations

import json
import logging
import socket
import time
from typing import Any

import pytest

from tests.serve.conftest import Running
from tests.serve.test_guard import JSON, chat, post

HEAD = b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
NEXT = b'GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n'


def exchange(running: Running, *parts: bytes) -> bytes:
    """All that comes back until the service closes the connection."""
    with socket.create_connection(('127.0.0.1', running.port), timeout=5) as raw:
        content = b''
        for number, part in enumerate(parts):
            if number:
                time.sleep(0.05)
            raw.sendall(part)
        while received := raw.recv(10_000):
            content += received
    return content


@pytest.mark.parametrize('request_', [
    HEAD + b'Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n',
    HEAD + b'Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n2\r\n{}\r\n0\r\n\r\n',
    HEAD.replace(b'1.1', b'1.0') + b'Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n',
    b'GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n',
])  # fmt: skip
def test_a_request_with_two_ends_is_refused_and_its_connection_closed(server: Running, request_: bytes) -> None:
    """Else what stands behind one end would be answered as a second request."""
    content = exchange(server, request_ + NEXT)
    assert content.startswith(b'HTTP/1.1 400 ') and content.count(b'HTTP/1.1') == 1
    assert b'Transfer-Encoding' in content


@pytest.mark.parametrize('head', [HEAD, HEAD.replace(b'application/json', b'text/plain'),
                                  HEAD.replace(b'localhost', b'evil.example'),
                                  b'GET /health HTTP/1.1\r\nHost: localhost\r\n'])  # fmt: skip
def test_a_broken_chunk_is_one_line_of_the_log(server: Running, head: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Whether the request is read, has been refused or has been answered by then."""
    logging.getLogger('xtuner').propagate = True
    for parts in ((b'zz\r\n{}\r\n',), (b'2\r\n{}\r\n', b'zz\r\n')):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            content = exchange(server, head + b'Transfer-Encoding: chunked\r\n\r\n' + parts[0], *parts[1:])
        assert content.startswith(b'HTTP/1.1 ')
        (line,) = [record.getMessage() for record in caplog.records if record.name == 'xtuner']
        assert 'not HTTP' in line
    assert post(server, chat(server))[0] == 200


def test_health_is_answered_to_a_load_balancer(server: Running) -> None:
    """HTTP/1.0 without a Host, by GET, HEAD and HAProxy's own OPTIONS."""
    for method in (b'GET', b'OPTIONS', b'HEAD'):
        content = exchange(server, method + b' /health HTTP/1.0\r\n\r\n')
        assert content.startswith(b'HTTP/1.1 200 '), content
        assert (b'"status":"ok"' in content) == (method != b'HEAD')


@pytest.mark.parametrize('path', ['/v1/chat/completions', '/v1/completions', '/v1/models', '/health'])
def test_a_slash_at_the_end_changes_nothing(server: Running, path: str) -> None:
    """A redirect would name http://, which is wrong behind a proxy with TLS."""
    body: Any = chat(server) if 'chat' in path else {'model': server.base, 'prompt': 'Hi', 'max_tokens': 2}
    if path.endswith('completions'):
        assert post(server, body, f'{path}/', X_Forwarded_Proto='https')[0] == 200
    else:
        content = exchange(server, f'GET {path}/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n'.encode())
        assert content.startswith(b'HTTP/1.1 200 ')
    assert post(server, {}, '/v1/embeddings/')[0] == 404


@pytest.mark.parametrize(('body', 'param'), [
    (b'{"\\ud800": 0}', '?'),
    (b'{"%s": 0}' % (b'x' * 5000), 'x' * 64),
    (b'{"%s": 0}' % ('\U0001f642' * 100).encode(), '\U0001f642' * 64),
])  # fmt: skip
def test_an_unknown_field_is_named_briefly(server: Running, body: bytes, param: str) -> None:
    status, error = post(server, body)
    assert (status, error['param'], error['code']) == (400, param, 'unknown_parameter')
    assert len(json.dumps(error, ensure_ascii=False)) < 400


def test_half_a_character_in_the_model_name_is_no_failure(server: Running) -> None:
    assert post(server, b'{"model": "\\ud800", "messages": [{"role": "user", "content": "Hi"}]}', **JSON)[0] == 404
