"""What stands before a request is looked at: who calls, by which name, how much and how fast it sends."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Collection
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from xtuner.chat.hosts import is_called
from xtuner.serve.problems import APIError
from xtuner.serve.responses import to_json

_DRAIN_BYTES, _DRAIN_S = 2**25, 5.0


class Guard:
    """Lets a request pass or raises Problem.

    Args:
        api_key: What clients must show; '' for nothing.
        hosts: Names by which the service may be called, see `xtuner.chat.hosts`; None for any.
    """

    def __init__(self, *, api_key: str, hosts: Collection[str] | None) -> None:
        self._hosts = hosts
        self._key = hashlib.sha256(api_key.encode()).digest() if api_key else None

    def check(self, http: HTTPRequest) -> None:
        """Looks at the headers."""
        if self._hosts is not None and not is_called(http.headers.get('host', ''), self._hosts):
            names = ', '.join(sorted(self._hosts))
            raise APIError(403, f'without an API key, this service is called as {names} only', unread=True)
        if self._key is None:
            return
        scheme, _, key = http.headers.get('authorization', '').partition(' ')
        shown = hashlib.sha256(key.strip().encode('latin-1')).digest()
        if not hmac.compare_digest(shown, self._key) or scheme.lower() != 'bearer':
            raise APIError(401, 'the API key is missing or wrong; send it as `Authorization: Bearer KEY`',
                          code='invalid_api_key', headers={'WWW-Authenticate': 'Bearer'}, unread=True)  # fmt: skip


class CheckFraming:
    """ASGI middleware: refuses requests whose end a proxy may see elsewhere than we do, and closes the connection.

    RFC 9112, section 6.1: both Content-Length and Transfer-Encoding, or Transfer-Encoding in HTTP/1.0. What a client
    hides behind such an end would be another client's request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        names = {name for name, _ in scope.get('headers', ())}
        chunked = b'transfer-encoding' in names
        if chunked and (b'content-length' in names or scope['http_version'] == '1.0'):
            problem = APIError(400, 'the request has both Content-Length and Transfer-Encoding; send one of them'
                              if b'content-length' in names else 'HTTP/1.0 knows no Transfer-Encoding')  # fmt: skip
            refusal = Refusal(to_json(problem.body()), 400, {'Connection': 'close'}, media_type='application/json')
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)


async def read_body(http: HTTPRequest, *, most: int, seconds: float) -> bytes:
    """The body of a request.

    Args:
        http: The request.
        most: Bytes that it may have.
        seconds: In which it must have come.

    Raises:
        Problem: it is no JSON by its header, too long, or too slow.
        ClientDisconnect: the client has gone.
    """
    kind = http.headers.get('content-type', '').split(';')[0].strip().lower()
    if kind != 'application/json':  # a form of a web page could send any other without asking
        raise APIError(415, 'the header `Content-Type` must be application/json', unread=True)
    announced = http.headers.get('content-length', '')
    if announced.isdigit() and int(announced) > most:
        raise _too_long(most, unread=True)
    try:
        return await asyncio.wait_for(_read(http.receive, most), seconds)
    except asyncio.TimeoutError:
        raise APIError(408, f'the request had not come whole after {seconds:g} s',
                      headers={'Connection': 'close'}) from None  # fmt: skip


async def _read(receive: Any, most: int) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message['type'] == 'http.disconnect':
            raise ClientDisconnect
        body += message.get('body', b'')
        more = message.get('more_body', False)
        if len(body) > most:
            raise _too_long(most, unread=more)
    return bytes(body)


def _too_long(most: int, *, unread: bool) -> APIError:
    return APIError(413, f'the request is longer than {most} bytes', code='request_too_large', unread=unread)


class Refusal(Response):
    """A response to a request whose body is still on its way.

    It is sent at once and the rest of the body thrown away, within limits, before the connection may be closed: closed
    over unread bytes, it would be reset, and the client would never see why.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends it."""
        await send({'type': 'http.response.start', 'status': self.status_code, 'headers': self.raw_headers})
        await send({'type': 'http.response.body', 'body': self.body, 'more_body': True})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drain(receive), _DRAIN_S)
        await send({'type': 'http.response.body', 'body': b'', 'more_body': False})

    async def _drain(self, receive: Any) -> None:
        left, more = _DRAIN_BYTES, True
        while more and left > 0:
            message = await receive()
            left -= len(message.get('body', b''))
            more = message.get('more_body', False)
