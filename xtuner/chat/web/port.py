"""Checks the port of the web page before Streamlit and the model are loaded."""

from __future__ import annotations

import socket
import sys
from contextlib import closing

from xtuner.errors import UsageError


def check_port(port: int) -> None:
    """Checks that a port is free.

    Raises:
        UsageError: the port is in use or not permitted.
    """
    with closing(socket.socket()) as probe:
        if sys.platform != 'win32':  # on Windows, the option would allow two listeners on one port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('127.0.0.1', port))
        except OSError as error:
            raise UsageError(f'--port {port}: {error.strerror}; remove the option to use the next free port') from error
