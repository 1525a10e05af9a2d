"""The process of a command: quick to start, quick to end, and stopped by Ctrl-C even while it imports."""

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
"""New containers between two looks for cycles. Python's own 700 cost 0.7 of the 3.0 s that importing a chat takes."""


def look_for_cycles_less_often() -> None:
    """Spares the imports most of the garbage collector's walks over half a million objects of libraries."""
    gc.set_threshold(_COLLECT_AFTER)


def write_what_the_locale_lacks() -> None:
    """Lets standard output write a character that its encoding has not as an escape, as standard error does.

    Else a run under `LC_ALL=C` would fail at its last line, where it prints the path of its checkpoint.
    """
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper) and (stdout.errors == 'strict' or stdout.encoding.lower() != 'utf-8'):
        stdout.reconfigure(errors='backslashreplace')


def leave(status: int) -> None:
    """Ends the process as `sys.exit` does, but does not take its modules apart, which lasts a second and more.

    Where a thread still has something to do, the interpreter ends itself.
    """
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        sys.exit(status)
    atexit._run_exitfuncs()
    end_now(status)


def flush_results() -> None:
    """Hands what was printed to whoever reads it, while an error can still be told.

    Raises:
        OSError: the disk is full, or the reader has gone.
    """
    try:
        if sys.stdout is not None:  # None where it was closed before we began
            sys.stdout.flush()
    except OSError as error:
        error.filename = 'standard output'
        raise


def forget_results() -> None:
    """Drops what was printed and that nobody reads any more, so that the interpreter does not try again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reader_has_gone() -> bool:
    """Whether nobody reads standard output or error any more; True where this system cannot tell."""
    if not hasattr(select, 'poll'):  # Windows
        return True
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            poll.register(stream.fileno(), 0)  # that the other end is closed is told in any case
    return bool(poll.poll(0))


@contextlib.contextmanager
def stops_at_once_while_importing() -> Iterator[None]:
    """Ctrl-C ends the process with status 130 where an import is under way, and is `KeyboardInterrupt` elsewhere.

    The exception does not reach us from everywhere: torch goes on without numpy when numpy's import is broken off, and
    transformers then fails minutes later with `ModuleNotFoundError`. Nothing that has to be put in order is open then.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # whoever called us has a handler of its own
        return
    command = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        """The signal's handler."""
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
