"""Logging setup: our own log lines go to stderr, informational output of other libraries is suppressed."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

from xtuner.ranks import is_first_process
from xtuner.utils.escape import printable


class _StderrHandler(logging.StreamHandler):
    """Writes to the current `sys.stderr`: an earlier one may be closed while a thread still logs."""

    @property
    def stream(self) -> TextIO:
        """The current stderr."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the line above the progress bars, if any are drawn."""
        if 'tqdm' not in sys.modules:
            super().emit(record)
            return
        from xtuner.utils.progress import above_bars

        with above_bars():
            super().emit(record)


class PrintableFormatter(logging.Formatter):
    """Log formatter that escapes untrusted text, such as file and model names."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats and escapes a record."""
        return printable(super().format(record))


def start_logging() -> None:
    """Sends `xtuner` log lines to stderr and suppresses informational output of the libraries below.

    Call it before torch and transformers are imported, because some of them log on import.
    """
    os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')  # avoids its warning after a fork
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    os.environ.setdefault('USE_HUB_KERNELS', 'NO')  # otherwise transformers fetches kernels for some model types
    if not sys.stderr.isatty():
        os.environ.setdefault('TQDM_DISABLE', '1')  # bars of other libraries: redrawn, they make log files unreadable
    handler = _StderrHandler()
    handler.setFormatter(PrintableFormatter('%(asctime)s  %(message)s', datefmt='%H:%M:%S'))
    project = logging.getLogger('xtuner')
    project.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    project.handlers = [handler]
    project.propagate = False
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', message='Paged optimizers are not supported on CPU')
    warnings.filterwarnings('ignore', category=FutureWarning, module=r'(torch|transformers|peft|mmengine)\.')
