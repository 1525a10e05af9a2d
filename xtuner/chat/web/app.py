"""The page's server: Streamlit, on this machine only, with a policy that lets a browser fetch nothing elsewhere."""

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

from xtuner.chat.hosts import LOOPBACK, is_called
from xtuner.chat.web.talk import SharedModel
from xtuner.config.find import shipped_folder
from xtuner.errors import UsageError

PAGE = Path(__file__).with_name('chat_page.py')
LAUNCHER = 'web_demo.py'  # in tools/; Streamlit's options lie beside it
# A second wall: whatever an answer makes the page draw, nothing is run that is not Streamlit's, and nothing is fetched.
HEADERS = {
    'Content-Security-Policy': (
        "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; frame-src 'none'; object-src 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    'X-DNS-Prefetch-Control': 'off',  # a link is not looked up before it is clicked
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
}

_shared: SharedModel | None = None


def share_model(shared: SharedModel) -> None:
    """Sets the model that every tab of this process's page talks to."""
    global _shared
    _shared = shared


def shared_model() -> SharedModel:
    """The model of this process's page.

    Raises:
        UsageError: none was set, since Streamlit runs the page's file itself.
    """
    if _shared is None:
        raise UsageError('no model is loaded; start the page with `xtuner chat LLM --web`')
    return _shared


class Guard:
    """ASGI middleware: refuses what another site's page asks for, and adds `HEADERS` to every answer.

    The page is called by a name of this machine alone, or by one that Streamlit's options name.
    Streamlit itself would compare a foreign origin with this machine's public address, which it asks a server far away.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope['type'] in ('http', 'websocket') and not _is_own(Headers(scope=scope)):
            await _refuse(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            """Sends a message; the start of an answer with our headers."""
            if message['type'] == 'http.response.start':
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] == 'websocket':
        await send({'type': 'websocket.close', 'code': 1008})
    else:
        why = 'this page answers itself only, called as localhost or by a name in --server.allowedHosts'
        await PlainTextResponse(why, status_code=403)(scope, receive, send)


def _is_own(headers: Headers) -> bool:
    """Whether a request comes from the page itself, or from no page at all."""
    if not is_called(headers.get('host', ''), LOOPBACK | _named_hosts()):
        return False
    return 'origin' not in headers or urlsplit(headers['origin']).netloc == headers.get('host')


def _named_hosts() -> set[str]:
    """The names that were given to Streamlit on the command line, in its file or in the environment."""
    found: set[str] = set()
    for option in ('server.address', 'browser.serverAddress', 'server.allowedHosts'):
        with suppress(RuntimeError):  # an older Streamlit does not know it
            value = get_option(option) or []
            found.update(host.lower() for host in ([value] if isinstance(value, str) else value))
    return found


MIDDLEWARE = [Middleware(Guard)]


def run_app(shared: SharedModel, port: int | None) -> None:
    """Serves the page until Ctrl-C.

    Args:
        shared: The model to talk to.
        port: Where; None takes the first free one from 8501.
    """
    share_model(shared)
    # Streamlit looks for its options beside what it is told it runs.
    sys.argv = [str(shipped_folder('tools') / LAUNCHER)]
    with suppress(KeyboardInterrupt):  # which Streamlit 1.67 lets through and 1.65 does not
        App(PAGE, middleware=MIDDLEWARE).run(config={} if port is None else {'server.port': port})
