"""The address is taken from the first moment on, and free again afterwards."""

from __future__ import annotations

import socket

import pytest

from xtuner.errors import UsageError
from xtuner.serve.server import listen

pytestmark = pytest.mark.unit


def test_an_address_is_taken_once() -> None:
    port = 0
    for _ in range(2):  # the second time over what is left of the first one's connection
        (taken,) = listen('127.0.0.1', port)
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f'cannot listen on 127.0.0.1:{port}'):
            listen('127.0.0.1', port)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.listen()
        with socket.create_connection(('127.0.0.1', port)):
            taken.accept()[0].close()
        taken.close()


def test_all_addresses_of_a_name_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `localhost` may be 127.0.0.1 and ::1; one that this machine does not have is left out."""
    stream = (socket.SOCK_STREAM, 6, '')

    def two(host: str, port: int, **_: object) -> list[tuple]:
        hosts = ('127.0.0.1', '192.0.2.1', '127.0.0.2', '127.0.0.1')
        return [(socket.AF_INET, *stream, (host, port)) for host in hosts]

    monkeypatch.setattr(socket, 'getaddrinfo', two)
    taken = listen('both', 0)
    names = [one.getsockname() for one in taken]
    assert [host for host, _ in names] == ['127.0.0.1', '127.0.0.2']
    assert len({port for _, port in names}) == 1
    with pytest.raises(UsageError, match=r'cannot listen on both:\d+'):
        listen('both', names[0][1])
    for one in taken:
        one.close()
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: [(socket.AF_INET, *stream, ('192.0.2.1', 0))])
    with pytest.raises(UsageError, match='cannot listen on none:0'):
        listen('none', 0)
