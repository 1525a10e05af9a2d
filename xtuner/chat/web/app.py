"""The server of the web page: Streamlit on this machine only, with a content security policy."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from streamlit.config import get_option
from streamlit.starlette import App

from xtuner.chat.hosts import LOOPBACK, is_allowed_host
from xtuner.chat.web.talk import SharedModel
from xtuner.config.find import shipped_folder
from xtuner.errors import UsageError

PAGE = Path(__file__).with_name('chat_page.py')
LAUNCHER = 'web_demo.py'  # in tools/, next to Streamlit's options
# Second layer of sanitising: the browser runs only Streamlit's scripts and fetches nothing from other origins.
HEADERS = {
    'Content-Security-Policy': (
        "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; frame-src 'none'; object-src 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    'X-DNS-Prefetch-Control': 'off',  # no DNS lookups for links before they are clicked
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
}

_shared: SharedModel | None = None


def share_model(shared: SharedModel) -> None:
    """Sets the model that all tabs of the page share."""
    global _shared
    _shared = shared


def shared_model() -> SharedModel:
    """The model that all tabs of the page share.

    Raises:
        UsageError: no model was loaded, because Streamlit was started with the page file itself.
    """
    if _shared is None:
        raise UsageError('no model is loaded; start the page with `xtuner chat LLM --web`')
    return _shared


class Guard:
    """ASGI middleware: rejects requests of other sites and adds `HEADERS` to every response.

    Accepted host names are the loopback names and those in Streamlit's options. Streamlit's own check would compare a
    foreign origin with the public IP address of this machine, which it requests from an external server.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rejects the request or passes it on."""
        if scope['type'] in ('http', 'websocket') and not _is_same_origin(Headers(scope=scope)):
            await _refuse(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            """Sends a message and adds our headers to the start of a response."""
            if message['type'] == 'http.response.start':
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] == 'websocket':
        await send({'type': 'websocket.close', 'code': 1008})
    else:
        reason = 'this page accepts only the host name localhost or a name in --server.allowedHosts, and its own origin'
        await PlainTextResponse(reason, status_code=403)(scope, receive, send)


def _is_same_origin(headers: Headers) -> bool:
    """Whether a request comes from the page itself, or from no page at all."""
    if not is_allowed_host(headers.get('host', ''), LOOPBACK | _named_hosts()):
        return False
    return 'origin' not in headers or urlsplit(headers['origin']).netloc == headers.get('host')


def _named_hosts() -> set[str]:
    """The host names in Streamlit's options, from the command line, its config file or the environment."""
    hosts: set[str] = set()
    for option in ('server.address', 'browser.serverAddress', 'server.allowedHosts'):
        with suppress(RuntimeError):  # unknown to older versions of Streamlit
            value = get_option(option) or []
            hosts.update(host.lower() for host in ([value] if isinstance(value, str) else value))
    return hosts


MIDDLEWARE = [Middleware(Guard)]


def run_app(shared: SharedModel, port: int | None) -> None:
    """Serves the page until Ctrl-C.

    Args:
        shared: The model.
        port: The port; None selects the first free one from 8501.
    """
    share_model(shared)
    # Streamlit looks for its options next to the script in argv.
    sys.argv = [str(shipped_folder('tools') / LAUNCHER)]
    with suppress(KeyboardInterrupt):  # raised by Streamlit 1.67, not by 1.65
        App(PAGE, middleware=MIDDLEWARE).run(config={} if port is None else {'server.port': port})
