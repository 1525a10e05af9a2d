"""Whether a port can be had, asked before Streamlit and the model are loaded."""

from __future__ import annotations

import socket
import sys
from contextlib import closing

from xtuner.errors import UsageError


def check_port(port: int) -> None:
    """Checks that a port can be had, before the model is loaded.

    Raises:
        UsageError: something else listens there.
    """
    with closing(socket.socket()) as probe:
        if sys.platform != 'win32':  # there, the option would let two listen on one port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('127.0.0.1', port))
        except OSError as error:
            raise UsageError(f'--port {port}: {error.strerror}; leave it out to take the next free one') from error
