"""What a user can cause, one class a kind; `assert` and every other exception mean a bug of ours.

A message is one line: what is wrong, where (file, line, field, value), and what to do next.
Each class also inherits the built-in exception that callers of a library would expect to catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class XTunerError(Exception):
    """Base of all errors that a user can cause and mend. The command line prints it and exits with `exit_status`."""

    exit_status = 1


class UsageError(XTunerError, ValueError):
    """The command was called wrongly."""

    exit_status = 2


class ConfigError(XTunerError, ValueError):
    """A config file, or a value in it, is wrong."""


class DataError(XTunerError, ValueError):
    """A data set, or a record of it, is wrong."""


class ModelError(XTunerError, ValueError):
    """A model folder, a tokenizer or their weights are wrong or missing."""


class CheckpointError(XTunerError, ValueError):
    """A checkpoint or an adapter is torn, missing or belongs to something else."""


class TrainingError(XTunerError, RuntimeError):
    """A run cannot go on: no gradient, no target, too many non-finite steps."""


class Interrupted(XTunerError):
    """A signal ended the run, which saved first. The command line exits with 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Returns a hint such as `; did you mean 'a' or 'b'?` for a misspelt `name`, or '' where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f'; did you mean {" or ".join(repr(c) for c in close)}?' if close else ''


def first_of(names: Sequence[str]) -> str:
    """The first of some names and how many there are beside it: "'a'", "'a' (and 2 more)"."""
    return repr(names[0]) + (f' (and {len(names) - 1} more)' if len(names) > 1 else '')


def one_line(error: object) -> str:
    """An exception of another library, or its text, on one line of an error message.

    The text of a KeyError is the key alone, and that of an assertion is often empty: the exception's name comes first.
    """
    text = ' '.join(str(error).split())[:500]
    if not text or isinstance(error, (LookupError, AssertionError, ArithmeticError, AttributeError, MemoryError)):
        return f'{type(error).__name__}: {text}' if text else type(error).__name__
    return text


def first_line(error: object) -> str:
    """What an exception of another library says first; its type where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
