"""Errors that a user can cause, one class per kind; `assert` and all other exceptions indicate bugs.

A message is one line: what is wrong, where (file, line, field, value), and what to do next.
Each class also inherits the built-in exception that callers of a library expect to catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class XTunerError(Exception):
    """Base of all errors that a user can cause and fix. The command line prints it and exits with `exit_status`."""

    exit_status = 1


class UsageError(XTunerError, ValueError):
    """The command line was wrong."""

    exit_status = 2


class ConfigError(XTunerError, ValueError):
    """A config file, or a value in it, is wrong."""


class DataError(XTunerError, ValueError):
    """A data set, or a record of it, is wrong."""


class ModelError(XTunerError, ValueError):
    """A model folder, a tokenizer or their weights are wrong or missing."""


class CheckpointError(XTunerError, ValueError):
    """A checkpoint or an adapter is damaged, missing or belongs to something else."""


class TrainingError(XTunerError, RuntimeError):
    """A run cannot continue: no gradient, no target, too many non-finite steps."""


class Interrupted(XTunerError):
    """A signal ended the run after it saved a checkpoint. The command line exits with 128 + the signal number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Returns a hint such as `; did you mean 'a' or 'b'?` for a misspelled `name`, or '' if nothing is similar."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f'; did you mean {" or ".join(repr(c) for c in close)}?' if close else ''


def first_of(names: Sequence[str]) -> str:
    """The first of several names and the number of others: "'a'", "'a' (and 2 more)"."""
    return repr(names[0]) + (f' (and {len(names) - 1} more)' if len(names) > 1 else '')


def first_few(names: Sequence[object], most: int) -> str:
    """The first `most` of several names, and the number of others: 'a, b and 2 more'."""
    more = f' and {len(names) - most:,} more' if len(names) > most else ''
    return ', '.join(map(str, names[:most])) + more


def one_line(error: object) -> str:
    """An exception of another library, or its text, on one line for an error message.

    The text of a KeyError is only the key, and that of an assertion is often empty, so the exception's name comes
    first.
    """
    text = ' '.join(str(error).split())[:500]
    if not text or isinstance(error, (LookupError, AssertionError, ArithmeticError, AttributeError, MemoryError)):
        return f'{type(error).__name__}: {text}' if text else type(error).__name__
    return text


def first_line(error: object) -> str:
    """First non-empty line of another library's exception; its type if it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
