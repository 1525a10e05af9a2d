"""The socket and the process around the service: connections that stall are closed, a signal ends it in good order."""

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

HEADER_S = 10.0  # seconds that a connection may be open without a request, or take for one's headers
_MOST_CONNECTIONS = 1000
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # this machine has no such address


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

    def send_400_response(self, msg: str) -> None:
        """Refuses what is not HTTP; a request under way learns that its client has gone."""
        logger.info('connection closed: what it sent is not HTTP')
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # a response is under way already
            self.transport.close()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_s, self.transport.abort)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def listen(host: str, port: int) -> list[socket.socket]:
    """Takes the addresses of a host, before the model is loaded; nobody can connect yet.

    Args:
        host: An address, or a name: all its addresses are taken, such as 127.0.0.1 and ::1 of `localhost`. Those that
            this machine does not have, as without IPv6, are left out where another is taken.
        port: 0 takes a free one, the same for all.

    Raises:
        UsageError: one is in use, or none can be taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f'--host {host}: {error}') from None
    taken: list[socket.socket] = []
    absent: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            taken.append(_bind(family, (address[0], port, *address[2:])))
            port = taken[0].getsockname()[1]
        except OSError as error:
            if error.errno not in _ABSENT:
                _close(taken)
                raise _cannot_listen(host, port, error) from None
            absent = error
    if not taken:
        assert absent is not None
        raise _cannot_listen(host, port, absent)
    return taken


def _bind(family: int, address: tuple[Any, ...]) -> socket.socket:
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what is left of a service before does not matter
        taken.bind(address)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # else one more could take it until we listen
    except OSError:
        taken.close()
        raise
    return taken


def _close(taken: Sequence[socket.socket]) -> None:
    for one in taken:
        one.close()


def _cannot_listen(host: str, port: int, error: OSError) -> UsageError:
    return UsageError(f'{host}:{port} cannot be had ({error.strerror}); choose another with --port')


class Server(uvicorn.Server):
    """uvicorn with an end to its patience with itself: whatever is under way, the process ends after a signal."""

    end_after_s = 0.0
    _deadline: threading.Timer | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal; the first one starts the clock."""
        super().handle_exit(sig, frame)
        if self._deadline is None:
            self._deadline = threading.Timer(self.end_after_s, _end_process)
            self._deadline.daemon = True  # it must not keep a process that ends in good order
            self._deadline.start()


def _end_process() -> None:
    logger.error('the service did not end in time: a thread is stuck; ended without waiting for it')
    end_now(1)


def make_server(app: Starlette, *, grace_s: float, header_s: float = HEADER_S) -> Server:
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
    server = Server(config)
    server.end_after_s = grace_s + 1
    return server


def serve(app: Starlette, taken: Sequence[socket.socket], *, grace_s: float) -> None:
    """Serves until SIGTERM or SIGINT; a second SIGINT ends it at once.

    A second after `grace_s` the process ends with status 1, even if a thread of it is stuck.

    Args:
        app: What answers.
        taken: What `listen` returned.
        grace_s: Seconds that requests under way have to end.

    Raises:
        UsageError: an address was taken meanwhile.
    """
    server = make_server(app, grace_s=grace_s)
    for one in taken:
        host, port = one.getsockname()[:2]
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.listen(server.config.backlog)  # who comes from now on is heard, if a moment later
        except OSError as error:
            _close(taken)
            raise _cannot_listen(host, port, error) from None
        logger.info('serving at http://%s:%d/v1', f'[{host}]' if ':' in host else host, port)
    # uvicorn raises the signal once more when it is done, for whoever had it before: a service that was asked to end
    # and did has succeeded.
    before = {number: signal.signal(number, _ended) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=list(taken))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(number: int, frame: FrameType | None) -> None:
    """Takes note of nothing: the service is at its end."""
