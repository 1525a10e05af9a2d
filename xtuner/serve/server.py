"""Sockets and process of the service: timeouts for stalled connections, graceful shutdown on a signal."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from xtuner.errors import UsageError
from xtuner.ranks import end_now

logger = logging.getLogger('xtuner')

HEADER_S = 10.0  # timeout for idle connections and for the headers of a request
_MAX_CONNECTIONS = 1000
_UNAVAILABLE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # this machine has no such address


class HeaderTimeoutProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a timeout for request headers, which uvicorn lacks."""

    header_s = HEADER_S
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts the timeout."""
        super().connection_made(transport)
        self._update_timeout()

    def data_received(self, data: bytes) -> None:
        """Stops the timeout while a request is handled; other data must become a request in time."""
        super().data_received(data)
        self._update_timeout()

    def on_response_complete(self) -> None:
        """Restarts the timeout."""
        super().on_response_complete()
        self._update_timeout()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timeout."""
        super().connection_lost(exc)
        self._cancel_timeout()

    def send_400_response(self, msg: str) -> None:
        """Rejects data that is not HTTP; a running request on the connection counts as disconnected."""
        logger.info('connection closed: it sent data that is not HTTP')
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # a response has already been started
            self.transport.close()

    def _update_timeout(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel_timeout()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_s, self.transport.abort)

    def _cancel_timeout(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def listen(host: str, port: int) -> list[socket.socket]:
    """Binds the addresses of a host before the model is loaded; clients cannot connect yet.

    Args:
        host: An address, or a name, of which all addresses are bound, such as 127.0.0.1 and ::1 for `localhost`.
            Addresses that this machine does not have, as without IPv6, are skipped if another one can be bound.
        port: 0 selects a free port, the same for all addresses.

    Raises:
        UsageError: an address is in use, or none can be bound.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f'--host {host}: {error}') from None
    sockets: list[socket.socket] = []
    unavailable: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(addresses):
        try:
            sockets.append(_bind(family, (address[0], port, *address[2:])))
            port = sockets[0].getsockname()[1]
        except OSError as error:
            if error.errno not in _UNAVAILABLE:
                _close(sockets)
                raise _cannot_listen(host, port, error) from None
            unavailable = error
    if not sockets:
        assert unavailable is not None
        raise _cannot_listen(host, port, unavailable)
    return sockets


def _bind(family: int, address: tuple[Any, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignores connections of an earlier service
        bound.bind(address)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # prevents another bind until we listen
    except OSError:
        bound.close()
        raise
    return bound


def _close(sockets: Sequence[socket.socket]) -> None:
    for bound in sockets:
        bound.close()


def _cannot_listen(host: str, port: int, error: OSError) -> UsageError:
    return UsageError(f'cannot listen on {host}:{port} ({error.strerror}); select another port with --port')


class Server(uvicorn.Server):
    """uvicorn with a hard deadline for shutdown: the process exits some time after a signal in any case."""

    shutdown_timeout_s = 0.0
    _deadline: threading.Timer | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal; the first one starts the deadline."""
        super().handle_exit(sig, frame)
        if self._deadline is None:
            self._deadline = threading.Timer(self.shutdown_timeout_s, _exit_process)
            self._deadline.daemon = True  # must not delay a regular exit
            self._deadline.start()


def _exit_process() -> None:
    logger.error('the service did not shut down in time: a thread is stuck; exiting without waiting for it')
    end_now(1)


def make_server(app: Starlette, *, grace_s: float, header_s: float = HEADER_S) -> Server:
    """Creates the server of an application; see `serve`."""
    logging.getLogger('uvicorn').setLevel(logging.CRITICAL)  # we log requests and errors ourselves
    config = uvicorn.Config(
        app,
        http=type('Protocol', (HeaderTimeoutProtocol,), {'header_s': header_s}),
        ws='none',
        lifespan='on',
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=max(int(header_s), 1),
        timeout_graceful_shutdown=int(grace_s),
    )
    server = Server(config)
    server.shutdown_timeout_s = grace_s + 1
    return server


def serve(app: Starlette, sockets: Sequence[socket.socket], *, grace_s: float) -> None:
    """Serves until SIGTERM or SIGINT; a second SIGINT stops at once.

    One second after `grace_s` the process exits with status 1, even if a thread is stuck.

    Args:
        app: The application.
        sockets: The sockets that `listen` returned.
        grace_s: Seconds for running requests to finish at shutdown.

    Raises:
        UsageError: an address has been taken meanwhile.
    """
    server = make_server(app, grace_s=grace_s)
    for bound in sockets:
        host, port = bound.getsockname()[:2]
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.listen(server.config.backlog)  # connections queue in the backlog from here on
        except OSError as error:
            _close(sockets)
            raise _cannot_listen(host, port, error) from None
        logger.info('serving at http://%s:%d/v1', f'[{host}]' if ':' in host else host, port)
    # uvicorn raises the signal again after its shutdown, for the previous handler. It is ignored, because a service
    # that was asked to stop and did so has succeeded.
    previous = {number: signal.signal(number, _ignore_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=list(sockets))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignore_signal(number: int, frame: FrameType | None) -> None:
    """Ignores a signal that arrives after the shutdown."""
