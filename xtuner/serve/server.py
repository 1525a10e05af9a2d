"""The socket and the process around the service: connections that stall are closed, a signal ends it in good order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from xtuner.errors import UsageError

logger = logging.getLogger('xtuner')

HEADER_S = 10.0  # seconds that a connection may be open without a request, or take for one's headers
_MOST_CONNECTIONS = 1000


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with an end to its patience: it would wait for a request's headers for ever."""

    header_s = HEADER_S
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts the clock."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stops it while a request is carried out; whatever else comes in must become one in time."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Starts it again."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops it."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_s, self.transport.abort)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def listen(host: str, port: int) -> socket.socket:
    """Takes an address, before the model is loaded; nobody can connect yet.

    Raises:
        UsageError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(f'--host {host}: {error}') from None
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what is left of a service before does not matter
        taken.bind(address)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # else one more could take it until we listen
    except OSError as error:
        taken.close()
        raise _not_to_be_had(host, port, error) from None
    return taken


def _not_to_be_had(host: str, port: int, error: OSError) -> UsageError:
    return UsageError(f'{host}:{port} cannot be had ({error.strerror}); choose another with --port')


def make_server(app: Starlette, *, grace_s: float, header_s: float = HEADER_S) -> uvicorn.Server:
    """The server of an application; see `serve`."""
    logging.getLogger('uvicorn').setLevel(logging.CRITICAL)  # our own log says what there is to say
    config = uvicorn.Config(
        app,
        http=type('Protocol', (PatientProtocol,), {'header_s': header_s}),
        ws='none',
        lifespan='on',
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=max(int(header_s), 1),
        timeout_graceful_shutdown=int(grace_s),
    )
    return uvicorn.Server(config)


def serve(app: Starlette, taken: socket.socket, *, grace_s: float) -> None:
    """Serves until SIGTERM or SIGINT; a second SIGINT ends it at once.

    Args:
        app: What answers.
        taken: What `listen` returned.
        grace_s: Seconds that requests under way have to end.

    Raises:
        UsageError: the address was taken meanwhile.
    """
    server = make_server(app, grace_s=grace_s)
    host, port = taken.getsockname()[:2]
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.listen(server.config.backlog)  # who comes from now on is heard, if a moment later
    except OSError as error:
        taken.close()
        raise _not_to_be_had(host, port, error) from None
    logger.info('serving at http://%s:%d/v1', f'[{host}]' if ':' in host else host, port)
    # uvicorn raises the signal once more when it is done, for whoever had it before: a service that was asked to end
    # and did has succeeded.
    before = {number: signal.signal(number, _ended) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[taken])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(number: int, frame: FrameType | None) -> None:
    """Takes note of nothing: the service is at its end."""
