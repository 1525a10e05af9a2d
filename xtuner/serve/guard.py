"""Checks before a request is parsed: host name, API key, framing, size and time of arrival."""

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

from xtuner.chat.hosts import is_allowed_host
from xtuner.serve.problems import APIError
from xtuner.serve.responses import to_json

_DRAIN_BYTES, _DRAIN_S = 2**25, 5.0


class Guard:
    """Accepts a request or raises APIError.

    Args:
        api_key: The required API key; '' if none is required.
        hosts: Accepted host names, see `xtuner.chat.hosts`; None for any.
    """

    def __init__(self, *, api_key: str, hosts: Collection[str] | None) -> None:
        self._hosts = hosts
        self._key = hashlib.sha256(api_key.encode()).digest() if api_key else None

    def check(self, http: HTTPRequest) -> None:
        """Checks the headers of a request."""
        if self._hosts is not None and not is_allowed_host(http.headers.get('host', ''), self._hosts):
            names = ', '.join(sorted(self._hosts))
            raise APIError(403, f'without an API key, this service accepts only the host names {names}', unread=True)
        if self._key is None:
            return
        scheme, _, key = http.headers.get('authorization', '').partition(' ')
        digest = hashlib.sha256(key.strip().encode('latin-1')).digest()
        if not hmac.compare_digest(digest, self._key) or scheme.lower() != 'bearer':
            raise APIError(401, 'the API key is missing or wrong; send it as `Authorization: Bearer KEY`',
                          code='invalid_api_key', headers={'WWW-Authenticate': 'Bearer'}, unread=True)  # fmt: skip


class CheckFraming:
    """ASGI middleware: rejects requests with ambiguous framing (request smuggling), closes the connection.

    RFC 9112, section 6.1: both Content-Length and Transfer-Encoding, or Transfer-Encoding in HTTP/1.0. A proxy may see
    a different end of such a request, and what follows could be taken for a request of another client.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rejects the request or passes it on."""
        names = {name for name, _ in scope.get('headers', ())}
        chunked = b'transfer-encoding' in names
        if chunked and (b'content-length' in names or scope['http_version'] == '1.0'):
            both = 'the request has both Content-Length and Transfer-Encoding; send one of them'
            old = 'HTTP/1.0 does not support Transfer-Encoding'
            error = APIError(400, both if b'content-length' in names else old)
            refusal = Refusal(to_json(error.body()), 400, {'Connection': 'close'}, media_type='application/json')
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)


async def read_body(http: HTTPRequest, *, max_bytes: int, timeout_s: float) -> bytes:
    """Reads the body of a request.

    Args:
        http: The request.
        max_bytes: Maximum size of the body.
        timeout_s: Seconds within which it must arrive.

    Raises:
        APIError: its content type is not JSON, it is too long, or too slow.
        ClientDisconnect: the client has disconnected.
    """
    kind = http.headers.get('content-type', '').split(';')[0].strip().lower()
    if kind != 'application/json':  # web pages can send other types across origins without a preflight request
        raise APIError(415, 'the header `Content-Type` must be application/json', unread=True)
    announced = http.headers.get('content-length', '')
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_long(max_bytes, unread=True)
    try:
        return await asyncio.wait_for(_read(http.receive, max_bytes), timeout_s)
    except asyncio.TimeoutError:
        raise APIError(408, f'the request did not arrive completely within {timeout_s:g} s',
                      headers={'Connection': 'close'}) from None  # fmt: skip


async def _read(receive: Any, max_bytes: int) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message['type'] == 'http.disconnect':
            raise ClientDisconnect
        body += message.get('body', b'')
        more = message.get('more_body', False)
        if len(body) > max_bytes:
            raise _too_long(max_bytes, unread=more)
    return bytes(body)


def _too_long(max_bytes: int, *, unread: bool) -> APIError:
    return APIError(413, f'the request is longer than {max_bytes} bytes', code='request_too_large', unread=unread)


class Refusal(Response):
    """An error response to a request whose body has not been read completely.

    It is sent at once. The rest of the body is then read and discarded, within limits, before the connection is closed:
    closing it with unread bytes would reset it, and the client would not see the response.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the response and drains the body."""
        await send({'type': 'http.response.start', 'status': self.status_code, 'headers': self.raw_headers})
        await send({'type': 'http.response.body', 'body': self.body, 'more_body': True})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drain(receive), _DRAIN_S)
        await send({'type': 'http.response.body', 'body': b'', 'more_body': False})

    async def _drain(self, receive: Any) -> None:
        remaining, more = _DRAIN_BYTES, True
        while more and remaining > 0:
            message = await receive()
            remaining -= len(message.get('body', b''))
            more = message.get('more_body', False)
