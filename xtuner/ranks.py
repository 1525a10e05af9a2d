"""Which process of a run this is, as far as the environment tells, and which of several tells the user of an error.

Known before torch is imported or a group joined.
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

# Set for processes that `xtuner train` started itself: it prints their error, they only leave it in a file.
CHILD = 'XTUNER_CHILD'
# torch's launcher names a file here in which a process may leave its error.
_ERROR_FILE = 'TORCHELASTIC_ERROR_FILE'

# Whether this process's error is the one to tell, given its text; set by `engine.watch` while a group exists.
error_arbiter: Callable[[str], bool] | None = None


def rank() -> int:
    """This process's number in its run: 0 for the only one."""
    return int(os.environ.get('RANK', os.environ.get('SLURM_PROCID', 0)))


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the one of rank 0 under torchrun or Slurm."""
    return rank() == 0


def should_report(text: str) -> bool:
    """Leaves an error for who started this process, and answers whether it shall be printed here.

    One failure ends all processes of a run; only the first of them is worth a line.

    Args:
        text: The error's one line.
    """
    if not is_one_of_several():
        return True
    first = error_arbiter(text) if error_arbiter is not None else _is_first_of_node()
    if first:
        _leave(text)
    return first and CHILD not in os.environ


def exit_rank(status: int) -> None:
    """After an error was told: ends this process now if it is in a group, whose orderly end would wait for others."""
    if error_arbiter is not None:
        end_now(status)


def end_now(status: int) -> NoReturn:
    """Ends this process without the interpreter's own end, but hands over what was printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it, closed, or None
            stream.flush()
    os._exit(status)


def is_one_of_several() -> bool:
    """Whether torchrun or Slurm started this process together with others."""
    return int(os.environ.get('WORLD_SIZE', os.environ.get('SLURM_NTASKS', 1))) > 1


def num_on_this_machine() -> int:
    """Processes of this run on this machine, as far as torchrun or Slurm tells; 1 where neither does."""
    told = os.environ.get('LOCAL_WORLD_SIZE') or os.environ.get('SLURM_NTASKS_PER_NODE', '')
    return max(1, int(told)) if told.isdigit() else 1


def _is_first_of_node() -> bool:
    """Before a group exists, the processes of a node agree through a file; without one only rank 0 speaks."""
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


def _leave(text: str) -> None:
    """In torch's form, whose launchers read it."""
    if _ERROR_FILE not in os.environ:
        return
    content = {'message': {'message': text, 'extraInfo': {'py_callstack': '', 'timestamp': str(int(time.time()))}}}
    try:
        Path(os.environ[_ERROR_FILE]).write_text(json.dumps(content), encoding='utf-8')
    except OSError:  # the launcher has gone, and the folder with it
        return
