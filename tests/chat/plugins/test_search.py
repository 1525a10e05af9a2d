"""The web search against a service on this machine that answers as Serper does, or does not."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from xtuner.chat.plugins.base import PluginError
from xtuner.chat.plugins.search import Search
from xtuner.errors import UsageError

pytestmark = pytest.mark.unit

SECRET = 'key-that-nobody-sees'


class Service(BaseHTTPRequestHandler):
    """Answers each query as its text says."""

    seen: list[tuple[str, str, dict[str, Any]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.seen.append((self.path, self.headers['X-API-KEY'], body))
        query, status, answer = body['q'], 200, b''
        if query == 'capital':
            entries = [{'title': 'T', 'snippet': f'Paris\n {i} ' + 'x' * 400} for i in range(9)]
            answer = json.dumps({'organic': entries}).encode()
        elif query == 'odd':
            answer = json.dumps({'organic': [1, {'title': 'only a title'}, {'snippet': None}, {}]}).encode()
        elif query.startswith('raw '):
            answer = query[4:].encode()
        elif query.startswith('status '):
            status = int(query[7:])
        elif query == 'large':
            answer = b' ' * (2**20 + 1)
        elif query == 'slow':
            time.sleep(3)
        self.send_response(status)
        if status == 302:
            self.send_header('Location', '/elsewhere')
        self.end_headers()
        with contextlib.suppress(OSError):  # who waited for the slow one has gone
            self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[tuple[Search, list[Any]]]:
    handler = type('Handler', (Service,), {'seen': []})
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield Search(SECRET, f'http://127.0.0.1:{server.server_port}/search', 0.5), handler.seen
    server.shutdown()
    server.server_close()
    thread.join()


def test_results(service: Any) -> None:
    search, seen = service
    lines = search.run('capital').splitlines()
    assert seen == [('/search', SECRET, {'q': 'capital'})]
    assert len(lines) == 3 and lines[0].startswith("<|1|>: 'Paris 0 xxx") and lines[2].startswith('<|3|>')
    assert all(len(line) < 320 for line in lines)
    assert search.run('odd') == "<|1|>: 'only a title'"
    search.run('raw {"organic": [{"snippet": "a"}]}')
    with pytest.raises(PluginError, match='no results'):
        search.run('raw {"organic": []}')


@pytest.mark.parametrize(('query', 'reason'), [
    ('status 403', 'status 403; check SERPER_API_KEY'), ('status 500', 'status 500'), ('status 302', 'status 302'),
    ('large', 'more than 1048576 bytes'), ('slow', 'did not respond within 0.5 s'), ('raw nothing', 'unexpected'),
    ('raw []', 'unexpected'), ('raw {}', 'unexpected'), ('raw ' + '[' * 250, 'unexpected'), ('  ', 'empty'),
])  # fmt: skip
def test_what_goes_wrong_is_said_without_the_key(
    service: Any, caplog: pytest.LogCaptureFixture, query: str, reason: str
) -> None:
    search, seen = service
    caplog.set_level(logging.DEBUG)
    with pytest.raises(PluginError, match=reason) as caught:
        search.run(query)
    assert SECRET not in f'{caught.value!r} {caught.value.__cause__!r} {caplog.text} {search!r}'
    assert [path for path, _, _ in seen if path != '/search'] == []


def test_nobody_listens() -> None:
    with pytest.raises(PluginError, match='did not respond'):
        Search(SECRET, 'http://127.0.0.1:9/search', 0.5).run('capital')


@pytest.mark.parametrize('url', ['http://example.org/search', 'file:///etc/passwd', 'ftp://example.org', 'search', ''])
def test_the_key_goes_only_where_it_is_safe(url: str) -> None:
    with pytest.raises(UsageError, match='must be an https URL'):
        Search(SECRET, url)


def test_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('SERPER_API_KEY', raising=False)
    with pytest.raises(UsageError, match='SERPER_API_KEY'):
        Search.from_environment()
    monkeypatch.setenv('SERPER_API_KEY', SECRET)
    assert repr(Search.from_environment()) == "Search('https://google.serper.dev/search')"
    monkeypatch.setenv('XTUNER_SEARCH_URL', 'http://localhost:1/x')
    assert 'localhost' in repr(Search.from_environment())
