"""The rank of this process as given by the environment, and which of several ranks reports an error.

Usable before torch is imported or a process group is initialized.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# Set for processes started by `xtuner train`: the parent prints their error, they only write it to a file.
CHILD = 'XTUNER_CHILD'
# torch's launcher names a file here in which a process may report its error.
_ERROR_FILE = 'TORCHELASTIC_ERROR_FILE'

# Decides whether this process reports its error, given the text; set by the watchdog while a process group exists.
error_arbiter: Callable[[str], bool] | None = None


def rank() -> int:
    """The rank of this process; 0 for a single process."""
    return int(os.environ.get('RANK', os.environ.get('SLURM_PROCID', 0)))


def is_first_process() -> bool:
    """Whether this is the only process of a run, or rank 0 under torchrun or Slurm."""
    return rank() == 0


def should_report(text: str) -> bool:
    """Writes an error to the launcher's error file; returns whether this process should print it.

    One failure ends all processes of a run; only the first error is reported.

    Args:
        text: The error on one line.
    """
    if not is_one_of_several():
        return True
    first = error_arbiter(text) if error_arbiter is not None else _is_first_of_node()
    if first:
        _write_error_file(text)
    return first and CHILD not in os.environ


def exit_rank(status: int) -> None:
    """After an error was reported: ends a process of a group now, since a normal exit would wait for the others."""
    if error_arbiter is not None:
        end_now(status)


def end_now(status: int) -> NoReturn:
    """Ends this process without the interpreter's shutdown, but flushes its output."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # broken pipe, closed, or None
            stream.flush()
    os._exit(status)


def is_one_of_several() -> bool:
    """Whether torchrun or Slurm started this process together with others."""
    return int(os.environ.get('WORLD_SIZE', os.environ.get('SLURM_NTASKS', 1))) > 1


def num_on_this_machine() -> int:
    """Number of this run's processes on this machine, as given by torchrun or Slurm; 1 otherwise."""
    count = os.environ.get('LOCAL_WORLD_SIZE') or os.environ.get('SLURM_NTASKS_PER_NODE', '')
    return max(1, int(count)) if count.isdigit() else 1


def _is_first_of_node() -> bool:
    """Before a group exists, the processes of a node agree through a file; without one only rank 0 reports."""
    if _ERROR_FILE not in os.environ:
        return is_first_process()
    marker = Path(os.environ[_ERROR_FILE]).parent.parent / 'first'
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return is_first_process()
    return True


def _write_error_file(text: str) -> None:
    """Writes the error in the format of torch's launchers."""
    if _ERROR_FILE not in os.environ:
        return
    content = {'message': {'message': text, 'extraInfo': {'py_callstack': '', 'timestamp': str(int(time.time()))}}}
    try:
        Path(os.environ[_ERROR_FILE]).write_text(json.dumps(content), encoding='utf-8')
    except OSError:  # the launcher has ended and removed the folder
        return
