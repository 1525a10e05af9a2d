"""The address is taken from the first moment on, and free again afterwards."""

from __future__ import annotations

import socket

import pytest

from xtuner.errors import UsageError
from xtuner.serve.server import listen


def test_an_address_is_taken_once() -> None:
    port = 0
    for _ in range(2):  # the second time over what is left of the first one's connection
        taken = listen('127.0.0.1', port)
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f'127.0.0.1:{port} cannot be had'):
            listen('127.0.0.1', port)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.listen()
        with socket.create_connection(('127.0.0.1', port)):
            taken.accept()[0].close()
        taken.close()
