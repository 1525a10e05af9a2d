"""Process setup and exit of a command: fast startup and exit, Ctrl-C during imports, closed or full output."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from xtuner.ranks import end_now

_COLLECT_AFTER = 10_000
"""Allocations between garbage collections. Python's default of 700 takes 0.7 of the 3.0 s of a chat's imports."""


def collect_garbage_less_often() -> None:
    """Raises the garbage collector's threshold, because imports create half a million long-lived objects."""
    gc.set_threshold(_COLLECT_AFTER)


def escape_unencodable_output() -> None:
    """Makes stdout escape characters that its encoding lacks, as stderr does.

    Otherwise a run with `LC_ALL=C` could fail in its last line, which prints the path of a checkpoint.
    """
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper) and (stdout.errors == 'strict' or stdout.encoding.lower() != 'utf-8'):
        stdout.reconfigure(errors='backslashreplace')


def exit_without_teardown(status: int) -> None:
    """Exits like `sys.exit`, but without destroying all modules, which takes a second or more.

    If a non-daemon thread is still running, the interpreter exits normally.
    """
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        sys.exit(status)
    atexit._run_exitfuncs()
    end_now(status)


def flush_output() -> None:
    """Flushes stdout while errors can still be reported.

    Raises:
        OSError: the disk is full, or the pipe is closed.
    """
    try:
        if sys.stdout is not None:  # None if it was closed before startup
            sys.stdout.flush()
    except OSError as error:
        error.filename = 'standard output'
        raise


def discard_output() -> None:
    """Discards buffered output of a closed pipe, so that the interpreter does not flush it again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def output_is_closed() -> bool:
    """Whether the reading end of stdout or stderr is closed; True if the system cannot tell."""
    if not hasattr(select, 'poll'):  # Windows
        return True
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            poll.register(stream.fileno(), 0)  # a closed reading end is always reported
    return bool(poll.poll(0))


@contextlib.contextmanager
def exit_on_interrupted_import() -> Iterator[None]:
    """Ctrl-C during an import exits with status 130; otherwise it raises `KeyboardInterrupt` as usual.

    Libraries may swallow the exception during an import: torch continues without numpy if its import is interrupted,
    and transformers then fails minutes later with `ModuleNotFoundError`. No cleanup is needed at that point.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # the caller has its own handler
        return
    command = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        """Handles SIGINT."""
        if _is_importing(frame):
            if os.getpid() == command:  # not in a process forked from it
                os.write(2, b'xtuner: interrupted\n')
            os._exit(130)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith('<frozen importlib'):
            return True
        frame = frame.f_back
    return False
