"""Reads untrusted JSON files within limits, and replaces files atomically.

An untrusted file may be a named pipe, larger than memory, nested deeper than Python's stack, or contain a key twice:
each is a one-line error that names the file. `xtuner.utils.fields` validates the fields.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xtuner.errors import XTunerError

MAX_BYTES = 64 * 2**20
"""Maximum size of a settings file. An index of 100,000 tensors has 10 MB."""
MAX_DEPTH = 64
"""Maximum nesting of objects and lists. Published settings have fewer than 10 levels."""


def read_object(
    path: Path, error: type[XTunerError], *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        path: The file.
        error: Exception class to raise.
        max_bytes: Maximum file size.
        max_depth: Maximum nesting of objects and lists.

    Raises:
        XTunerError: Of the given class: not a regular file, too large, not UTF-8, not JSON, not an object, nested too
            deeply, or a key occurs twice with different values.
    """
    check_regular(path, error)
    try:
        with path.open('rb') as file:
            raw = file.read(max_bytes + 1)
        if len(raw) > max_bytes:
            raise error(f'{path} cannot be read: it is larger than {max_bytes >> 20} MiB')
        return parse_object(raw, max_depth=max_depth)
    except OSError as problem:
        raise error(f'{path} cannot be read: {problem.strerror or problem}') from problem
    except ValueError as problem:
        if isinstance(problem, XTunerError):
            raise
        raise error(f'{path} cannot be read: {problem}') from problem


def parse_object(raw: bytes, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Parses a JSON object from UTF-8 bytes; raises ValueError where `read_object` raises `error`."""
    try:
        content = json.loads(raw.decode('utf-8'), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(_TOO_DEEP.format(max_depth)) from None
    if not isinstance(content, dict):
        raise ValueError('expected a JSON object')
    _check_depth(content, max_depth)
    return content


def expanded(path: str | Path) -> Path:
    """Expands `~` to the home folder; a name without a matching user is returned as is: `~.jsonl` is a file."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_regular(path: Path, error: type[XTunerError], advice: str = '') -> os.stat_result:
    """Returns the stat of a file; raises `error`, with `advice`, unless it is a regular file.

    Call it before opening a file: opening a named pipe would block forever.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        reason = getattr(problem, 'strerror', None) or problem
        link = f'it is a link to {os.readlink(path)}, which cannot be followed: ' if os.path.islink(path) else ''
        raise error(f'{path} cannot be read: {link}{reason}') from problem
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), 'not a regular file')
        raise error(f'{path} cannot be read: it is {kind}{advice}')
    return status


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Writes a temporary file next to `path` and renames it: readers see the complete new or the previous content.

    Args:
        path: The file; replaced if it exists.
        content: Text is encoded as UTF-8.
        durable: Flush the file before the rename and its folder afterwards, so that a power failure
            leaves one of the two.

    Raises:
        OSError: The file cannot be written; `path` is unchanged.
    """
    partial = path.with_name(f'{path.name}.partial')
    partial.write_bytes(content.encode('utf-8') if isinstance(content, str) else content)
    if durable:
        flush(partial)
    os.replace(partial, path)
    if durable:
        flush(path.parent)


def flush(path: Path) -> None:
    """Flushes a file's content, or the entries of a folder, to the disk (fsync)."""
    if path.is_dir() and not _POSIX:  # on Windows folders cannot be opened and need no flush
        return
    descriptor = os.open(path, os.O_RDONLY if _POSIX else os.O_RDWR)  # Windows can flush only writable files
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_POSIX = os.name == 'posix'
_KINDS = {
    stat.S_IFDIR: 'a folder', stat.S_IFIFO: 'a named pipe', stat.S_IFSOCK: 'a socket', stat.S_IFCHR: 'a device',
    stat.S_IFBLK: 'a device',
}  # fmt: skip
_TOO_DEEP = 'it is nested deeper than {} levels'


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object; parsers differ in which value of a duplicate key they use."""
    content = dict(pairs)
    if len(content) < len(pairs):
        for key, value in pairs:
            if content[key] != value:
                raise ValueError(f'the key {key[:64]!r} occurs twice, with different values')
    return content


def _check_depth(content: Any, most: int) -> None:
    """Iterates level by level, so that no depth overflows the stack."""
    level: list[Any] = [content]
    for _ in range(most):
        level = [item for value in level for item in _items(value)]
        if not level:
            return
    raise ValueError(_TOO_DEEP.format(most))


def _items(value: Any) -> Iterable[Any]:
    """Objects and lists directly inside an object or a list."""
    inner = value.values() if isinstance(value, dict) else value
    return [item for item in inner if isinstance(item, (dict, list))]
