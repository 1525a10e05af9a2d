"""Who the page answers: the browser on this machine, under its own names or those that were given."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip('streamlit', reason="the page needs Streamlit: pip install 'xtuner[web]'")

from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from xtuner.chat.web import app


async def page(scope: Any, receive: Any, send: Any) -> None:
    """Stands for Streamlit."""
    if scope['type'] == 'websocket':
        await send({'type': 'websocket.accept'})
        await send({'type': 'websocket.close'})
    else:
        await send({'type': 'http.response.start', 'status': 200, 'headers': []})
        await send({'type': 'http.response.body', 'body': b''})


def statuses(host: str, origin: str | None = None) -> set[int]:
    """Of a request and of the page's connection; 1008 where that is refused."""
    client = TestClient(app.Guard(page), base_url=f'http://{host}')
    headers = {'origin': origin} if origin else {}
    found = {client.get('/', headers=headers).status_code}
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        client.websocket_connect(f'ws://{host}/s', headers=headers) as socket,
    ):
        socket.receive_text()
    return found | {200 if closed.value.code == 1000 else closed.value.code}


@pytest.mark.parametrize('host', ['localhost:8501', '127.0.0.1:8501'])
def test_the_page_itself_is_answered(host: str) -> None:
    assert statuses(host) == {200}
    assert statuses(host, f'http://{host}') == {200}
    assert statuses(host, 'http://evil.example:8501') == {403, 1008}


def test_a_name_that_was_pointed_here_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: to the browser the page at http://evil.example:8501 and this one are the same site."""
    assert statuses('evil.example:8501', 'http://evil.example:8501') == {403, 1008}
    assert statuses('evil.example:8501') == {403, 1008}


@pytest.mark.parametrize(('option', 'value'), [
    ('server.allowedHosts', ['tuner.example', '127.0.0.1']), ('browser.serverAddress', 'Tuner.Example'),
    ('server.address', 'tuner.example'),
])  # fmt: skip
def test_a_name_that_was_given_is(option: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = app.get_option
    monkeypatch.setattr(app, 'get_option', lambda name: value if name == option else known(name))
    assert statuses('tuner.example:8501', 'http://tuner.example:8501') == {200}
    assert statuses('other.example:8501', 'http://other.example:8501') == {403, 1008}


def test_an_older_streamlit_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> Any:
        raise RuntimeError(f'Config key "{name}" not defined.')

    monkeypatch.setattr(app, 'get_option', unknown)
    assert statuses('localhost') == {200}
